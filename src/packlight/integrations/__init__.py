"""Where packlight meets other programs: plain scripts (`script.py`), and frameworks, one file each.

>>> from packlight.integrations.script import Settings, Target, run_script
>>> Target(script="train.py", arguments=("--steps", "3")).command
('train.py', '--steps', '3')
"""

__all__: list[str] = []
