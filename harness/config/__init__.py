"""The configuration of a run: its schema, how it is composed, and every check that precedes the work."""

from typing import TYPE_CHECKING

from harness.config.places import CONF, ROOT
from harness.config.problems import ConfigError
from harness.config.schema import RunConf, TrainerConf, register
from harness.lazily import attributes

if TYPE_CHECKING:
    from harness.config.plan import RunPlan, plan_of, plan_run
else:
    __getattr__ = attributes(
        __name__,
        {
            "plan": "RunPlan plan_of plan_run",
        },
    )

__all__ = ["CONF", "ROOT", "ConfigError", "RunConf", "RunPlan", "TrainerConf", "plan_of", "plan_run", "register"]
