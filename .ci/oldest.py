"""Print, as constraints for pip, the oldest release of everything that `pyproject.toml` allows."""

import re
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for one in chain(project["dependencies"], *project["optional-dependencies"].values()):
    print(re.sub(r"\[.*?\]|;.*", "", one).replace(">=", "=="))
