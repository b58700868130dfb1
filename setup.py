"""The package as setuptools builds it; versions and requirements are read from settings.ini."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
# What an installed package needs beside its modules; a checkout reads the same folders in place.
SHIPPED = ("data", "nbs/paper", "nbs/recipes", "outputs/reference")

ini = ConfigParser(delimiters=["="])
ini.read(HERE / "settings.ini", encoding="utf-8")
settings = ini["DEFAULT"]


class BuildWithFiles(build_py):
    "Copies the shipped folders into the package, as octomed/_shipped."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / settings["lib_name"] / "_shipped"
        shutil.rmtree(target, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".*")
        for folder in SHIPPED:
            shutil.copytree(HERE / folder, target / folder, ignore=ignored)


def requirements_of(extra: str) -> list[str]:
    "The requirements of an extra, such as `dev`."
    return settings[f"{extra}_requirements"].split()


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Typing :: Typed",
    ],
    project_urls={"Source": settings["git_url"]},
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    packages=find_packages(include=["octomed", "octomed.*"]),
    package_data={"octomed": ["py.typed"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={
        name: requirements_of(name)
        for name in ("dev", "vllm", "train", "cluster", "real", "book", "course")
    },
    cmdclass={"build_py": BuildWithFiles},
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": ["octomed=octomed._modidx:d"],
    },
)
