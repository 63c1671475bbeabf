"""The zoo is collected for `make test-zoo` alone: it needs packages of its own, and minutes."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
collect_ignore_glob = [] if "FWDLIB_ZOO" in os.environ else ["*.py"]
