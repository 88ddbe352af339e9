"""Packages the library with its settings folder; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SETTINGS = [p.relative_to(ROOT) for p in sorted((ROOT / "configs").rglob("*")) if p.is_dir()]
# configs/ of the checkout becomes asymkv/configs of an installation.
CONFIG_PACKAGES = {"asymkv.configs": "configs"}
CONFIG_PACKAGES |= {"asymkv." + ".".join(p.parts): str(p) for p in SETTINGS}

setup(
    packages=[*find_packages(include=["asymkv", "asymkv.*"]), *CONFIG_PACKAGES],
    package_dir=CONFIG_PACKAGES,
    package_data={name: ["*.yaml", "*.json"] for name in CONFIG_PACKAGES} | {"asymkv": ["py.typed"]},
)
