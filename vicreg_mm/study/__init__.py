"""A study: one configuration in several variants ("cells") and seeds, each an ordinary run in a directory of its own, and their table.

    runs/NAME-NNN/config.json         the configuration that all cells have in common
                  study.json          the cells (what each changes), the seeds, what came out of each run, the table as numbers
                  table.md            the table, written anew after every run
                  CELL-seedS/         an ordinary run directory
                  CELL-seedS.log      what that run said

A recipe says in a page which cells there are and which columns of the table it wants, and calls `main`. A run that fails is an entry of
the table. With --resume a study keeps its finished runs, goes on with the interrupted ones, tries the failed ones again and may
have got more cells and seeds; what it had may not change.
"""

from vicreg_mm.study.definition import Changes as Changes
from vicreg_mm.study.definition import StudyConfig as StudyConfig
from vicreg_mm.study.definition import chosen as chosen
from vicreg_mm.study.definition import one_at_a_time as one_at_a_time
from vicreg_mm.study.definition import two_view_objectives as two_view_objectives
from vicreg_mm.study.program import main as main
