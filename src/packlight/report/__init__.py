"""Shows records to people: plans, runs, what was expected beside what happened. Needs no torch.

>>> from packlight.report import text
>>> text.read_record
<function read_record at ...>
"""

from packlight.report.text import read_record, show

__all__ = ["read_record", "show"]
