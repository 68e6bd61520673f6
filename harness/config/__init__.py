"""The configuration of a run: its schema, how it is composed, and every check that precedes the work."""

from harness.config.places import CONF, ROOT
from harness.config.plan import RunPlan, plan_of, plan_run
from harness.config.problems import ConfigError
from harness.config.schema import RunConf, TrainerConf, register

__all__ = ["CONF", "ROOT", "ConfigError", "RunConf", "RunPlan", "TrainerConf", "plan_of", "plan_run", "register"]
