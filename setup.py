"""The packages: those of ``harness``, and ``conf/`` as the package's own folder of configs (see pyproject.toml)."""

from setuptools import find_packages, setup

CONFIGS = "harness.conf"
"""``conf/`` at the top of a clone; a wheel carries it in the package."""

setup(packages=[*find_packages(include=["harness*"]), CONFIGS], package_dir={CONFIGS: "conf"})
