"""The packages of a wheel; all else of the packaging stands in setup.cfg."""

from setuptools import find_packages, setup

# configs/ and slurm/ travel inside the package, so that an installed fixres submits jobs as a checkout does.
INSIDE = {"fixres_dist.configs": "configs", "fixres_dist.slurm": "slurm"}

setup(packages=[*find_packages(include=["fixres_dist*"]), *INSIDE], package_dir=INSIDE)
