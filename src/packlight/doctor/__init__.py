"""What works on this machine: every part that packlight may use is tried, and its absence told by what that costs.

    report = examine(disk="/scratch")
    report.healthy          # packlight can plan and run here
    report.findings         # one for each part: what was found, and what it costs where it does not work

`findings.py` is the record, `limits.py` reads what the operating system allows, `packages.py` imports the optional
packages, each in a process of its own, and `trials.py` tries what packlight does itself.
"""

from packlight.doctor.examine import examine
from packlight.doctor.findings import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "examine"]
