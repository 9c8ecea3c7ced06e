"""Writes zoo/README.md: the table of all model folders in zoo/, from their logs.

python scripts/zoo_table.py
"""

from pathlib import Path

from timm_iebn.zoo import results_table

ZOO = Path(__file__).parents[1] / "zoo"
HEADER = """\
<!-- written by scripts/zoo_table.py -->
# Zoo

Top-1 accuracy in percent on the test split after the last epoch, mean and standard deviation over seeds. Both sides of
a row were trained by one recipe.

"""

if __name__ == "__main__":
    (ZOO / "README.md").write_text(HEADER + results_table(ZOO))
