"Reads everything from settings.ini, so that versions and requirements stand in one place."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("dev", "vllm", "train", "cluster")}

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(), classifiers=["Intended Audience :: Science/Research", "Programming Language :: Python :: 3"],
    project_urls={"Source": cfg["git_url"]}, author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    packages=find_packages(include=["octomed", "octomed.*"]), python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["octomed=octomed._modidx:d"]},
)
