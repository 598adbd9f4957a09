"""Write the tables into the docs: ``python -m tests.matrix``."""

from tests.matrix._table import PAGE, page

if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
