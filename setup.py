"""Everything about the project is in pyproject.toml, but this: a wheel holds configs/, eval/ and launch/ too.

They keep their place in the repository; in the wheel they are `ema_scale/shipped/{configs,eval,launch}`.
"""

from setuptools import find_packages, setup

SHIPPED = {f"ema_scale.shipped.{folder}": folder for folder in ("configs", "eval", "launch")}

setup(
    packages=[*find_packages(include=["ema_scale*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "ema_scale": ["py.typed", "**/*.j2", "**/*.css", "**/*.yaml", "smallworld/weights/**/*"],
        **{package: ["**/*.yaml", "**/*.json", "**/*.sbatch", "**/*.sh", "**/Containerfile"] for package in SHIPPED},
    },
)
