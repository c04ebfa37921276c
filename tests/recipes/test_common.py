"""What the recipes share in the terminal."""

import io

import pytest
from rich.console import Console

from samplewise.recipes.common import print_table


@pytest.mark.parametrize("width", [40, 110])
def test_a_table_loses_nothing_in_a_narrow_terminal(width):
    console = Console(file=io.StringIO(), width=width)
    print_table(
        console, ["arm", "right, ref.", "perplexity"], [["Plain, as long as BASH", "0.682 ± 0.006", "5.40 ± 0.27"]] * 3
    )
    text = console.file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    for part in ("Plain, as long as BASH", "0.682 ± 0.006", "5.40 ± 0.27"):
        for word in part.split():
            assert text.count(word) >= 3
    assert "…" not in text
