"""The configuration of a run: its schema, how it is composed, and every check that precedes the work."""

from harness.config.plan import ROOT, ConfigError, RunConf, RunPlan, plan_run, register

__all__ = ["ROOT", "ConfigError", "RunConf", "RunPlan", "plan_run", "register"]
