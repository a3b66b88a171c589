"""Runs the contract tests on a Citus cluster: `python -m bench.cluster URL`.

The database of the URL must have the extension citus and its nodes. All data of Daybook in the database is deleted.
"""

from __future__ import annotations

import subprocess
import sys

PLANS = "tests/store/test_plans.py"


def main() -> int:
    """Returns 1 if a contract test fails. Failed tests of query plans don't count: a cluster has other plans."""
    if len(sys.argv) != 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    pytest = [sys.executable, "-m", "pytest", "--numprocesses", "0", "--cluster-url", sys.argv[1]]
    contract = subprocess.run([*pytest, "--ignore", PLANS], check=False)
    sys.stdout.write("\nTests of query plans:\n")
    sys.stdout.flush()
    subprocess.run([*pytest, PLANS], check=False)
    return int(contract.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
