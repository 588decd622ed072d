"""What the documentation site shows of docstrings and comments."""

from tools.docs.markdown import as_markdown, comment_of


def test_lines_about_names_become_a_list() -> None:
    text = "Opens a model.\n\npath: a folder,\n    or a name.\nx, y: two more\n\nRaises: nothing.\nz: no name"
    listed = "Opens a model.\n\n- `path`: a folder,\n  or a name.\n- `x, y`: two more\n\nRaises: nothing.\nz: no name"
    assert as_markdown(text, {"path", "x", "y"}) == listed


def test_a_list_is_set_apart_from_the_text_before_it() -> None:
    assert as_markdown("What it does.\nx: this", {"x"}) == "What it does.\n\n- `x`: this"


def test_other_text_stays() -> None:
    text = "    x: code\n\nSee y: z"
    assert as_markdown(text, {"x", "y"}) == text


def test_comments() -> None:
    lines = [
        "# of a cake",
        "# and more",
        "N: int",
        "K: int  # columns",
        "s = '# no' # yes",
        "f = (",
        "    1,  # one",
        ")",
    ]
    assert comment_of(lines, 3, 3) == "of a cake and more"
    assert comment_of(lines, 4, 4) == "columns"
    assert comment_of(lines, 5, 5) == "yes"
    assert comment_of(lines, 6, 8) == "one"
    assert comment_of(["", "N: int"], 2, 2) == ""
