"""The model card: what comes from prompts, names and paths stays text, in a block, a span or a sentence."""

import pytest
from markdown_it import MarkdownIt

from pecker_fast.export.card import Card
from pecker_fast.export.markdown import block, code, plain
from pecker_fast.export.text_pipeline import USAGE
from pecker_fast.recipe import recipe_from

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](https://evil.example/x.png)",
    "[free weights](javascript:alert(1))",
    "cat**\n\n# Verdict: harmless\n\n| a | b |\n|---|---|\n",
    "cat\n```\n<script>alert(1)</script>\n```\n",
    "cat\r\n````\n# free",
    "see https://evil.example and www.evil.example or a@evil.example",
    "`rm -rf ~` $x$ &lt;b&gt; \\<b>",
    "left\u202eright\u2028# heading\x1b[2J",
    "a ``` b ```` c",
]


def rendered(text):
    """Blocks of a card as a reader of CommonMark sees them: outside code nothing is a tag, a link or a heading of its own."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)


def structure(text):
    """Kinds of all blocks and inline marks."""
    return [(t.type, t.tag, [c.type for c in t.children or ()]) for t in rendered(text)]


def card(forgotten, **keys):
    recipe = recipe_from({"model": "digits", "forget": 0, "cover": 1, **keys})
    usage = USAGE.format(folder="pipeline", prompt=forgotten, t_init=440, height=8, width=8)
    metrics = {
        "after": {"ua": 0.99, "samples": 500, "seed": 1},
        "before": {"ua": 0.1, "samples": 500, "seed": 1},
        "forget_steps": 5,
    }
    return Card(recipe, "b" * 64, "w" * 64, metrics).markdown(forgotten, usage, "Judged.")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_has_the_same_shape_whatever_is_forgotten(text):
    keys = {"forget": {"concept": text.strip() or "x", "prompts": ["a cat"]}, "cover": "a dog", "retain": [text]}
    assert structure(card(text, model=text, **keys)) == structure(card("cat", model="m", **keys))
    assert not any(kind == "html_block" for kind, *_ in structure(card(text, model=text, **keys)))


@pytest.mark.parametrize("text", HOSTILE)
def test_text_reads_as_it_is(text):
    (_, inline, _) = rendered(f"x {plain(text)} y")
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children).isprintable()
    (_, inline, _) = rendered(f"x {code(text)} y")
    assert [child.type for child in inline.children] == ["text", "code_inline", "text"]
    (fence,) = rendered(block(text, "yaml"))
    assert (fence.type, fence.info) == ("fence", "yaml")


def test_plain_words_are_left_as_they_are():
    for text in ("class 0 (class 1 is drawn in its place)", "“Marvel's hero” (“a man, 30” …)", "UA: 99.8 %"):
        assert plain(text) == text
    assert "# One-step generator that has forgotten class 0" in card("class 0")
    assert block("a: 1\n", "yaml") == "```yaml\na: 1\n```"
    assert code("runs/digits") == "`runs/digits`"
