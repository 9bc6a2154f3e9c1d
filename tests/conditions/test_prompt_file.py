"""Prompt files, to train and to evaluate with: text, CSV and TSV, and every way they can be wrong."""

import pytest

from pecker_fast.conditions.prompt_file import PromptFile, placed, read_prompts
from pecker_fast.conditions.prompts import concept_names, plan_prompts
from pecker_fast.errors import DataError, RecipeError


@pytest.fixture
def read(tmp_path):
    """read(content, name) -> the prompts in a file of that content."""

    def make(content, name="prompts.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_prompts(path)

    return make


def test_a_prompt_a_line(read):
    found = read("# portraits\na photo of  a man\r\n\n  een café, ’s avonds\nno comment # here\n", "p.txt")
    assert found == PromptFile(("a photo of a man", "een café, ’s avonds", "no comment # here"))


def test_csv_as_i2p_has_it(read):
    content = (
        "prompt,categories,hard,sd_seed,sd_guidance_scale\n"
        '"a ""b"", c","hate, harassment",0,123,7\n'
        ",,,,\n"
        '"two\nlines",shocking,1,4294967295,8\n'
    )
    found = read(content)
    assert found.texts == ('a "b", c', "two lines")
    assert found.seeds == (123, 4294967295)
    assert found.categories == (("hate", "harassment"), ("shocking",))


def test_csv_with_prompts_alone(read):
    assert read("id, Prompt \n1,a cat\n", "P.CSV") == PromptFile(("a cat",))


def test_which_column_of_seeds_counts(read):
    assert read("prompt,seed,sd_seed,evaluation_seed\na,1,2,3\n").seeds == (3,)
    assert read("prompt,seed,sd_seed\na,1,2\n").seeds == (2,)
    assert read("prompt,seed\na,1\n").seeds == (1,)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("coco.csv", ',case_number,prompt,evaluation_seed\n0,7,"a, b",5\n1,8,c,6\n'),
        ("excel.csv", '\ufeffcaption;evaluation_seed\r\n"a, b";5\r\nc;6\r\n'),
        ("tabs.csv", "id\ttext\tseed\n1\ta, b\t5\n2\tc\t6\n"),
        ("p.TSV", "Text\tSeed\na, b\t5\nc\t6\n"),
        ("both.csv", 'text,caption,prompt,seed\nx,y,"a, b",5\nx,y,c,6\n'),
    ],
)
def test_tables_of_other_programs(read, name, content):
    assert read(content, name) == PromptFile(("a, b", "c"), (5, 6))


def test_text_may_hold_commas(read):
    assert read("prompt,seed\n", "p.txt").texts == ("prompt,seed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"line 1: no column named prompt, caption or text; the columns are none"),
        ("title,Seed\na,1\n", r"line 1: no column named prompt, caption or text; the columns are title, seed"),
        ("prompt,seed\n\n", r"line 2: the file ends without a single prompt"),
        ("prompt,seed\na,1\n,2\n", r"line 3: the prompt is empty"),
        ("prompt,seed\na,1\nb,\n", r"line 3: seed '' is no whole number"),
        ("prompt,sd_seed\na,1.5\n", r"line 2: sd_seed '1.5' is no whole number"),
        ("prompt,seed\na,-1\n", r"line 2: seed '-1'"),
        ("prompt,seed\na,9223372036854775808\n", r"line 2: seed"),
        ("prompt,seed\na,1\na, b,2\n", r"line 3: 3 cells under 2 columns"),
        ("prompt,seed\na\n", r"line 2: 1 cells under 2 columns"),
        ('prompt\n"a\n', r"line 2: not a CSV file"),
        ('prompt\n"a"b\n', r"line 2: not a CSV file"),
        ("prompt\n" + "a" * 200_000 + "\n", r"line 2: not a CSV file: field larger"),
        (b"prompt\na\n" + b"\xe9t\xe9\n", r"line 3: not UTF-8 text"),
    ],
)
def test_wrong_csv(read, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read(content)
    assert "prompts.csv, line " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: the file ends without a single prompt"),
        ("\n \n# nothing\n", "line 3: the file ends"),
        (b"a cat\nun \xff chat\n", "line 2: not UTF-8"),
        (b"a\0b\n", "not text"),
    ],
)
def test_wrong_text(read, content, message):
    with pytest.raises(DataError, match=message):
        read(content, "p.txt")


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(DataError, match="not a regular file"):
        read_prompts(tmp_path)


def test_a_placeholder_is_every_name_of_the_concept(read):
    names = concept_names([{"concept": "cat, elephant", "prompts": []}, {"keywords": ["k"], "prompts": []}])
    file = read('prompt,seed,categories\na {} here,1,x\n"no {}s, dog",2,\n', "p.csv")
    with pytest.raises(RecipeError, match=r"\{\} must stand as a word of its own in 'no \{\}s, dog'"):
        placed(file, names)
    file = read("prompt,seed,categories\na {} here,1,x\na dog,2,\n", "p.csv")
    texts = ("a cat here", "an elephant here", "a dog")
    assert placed(file, names) == PromptFile(texts, (1, 1, 2), (("x",), ("x",), ()))
    assert plan_prompts({"concept": "cat, elephant", "prompts": list(file.texts[:1])}, "b", ["c"]).forget == texts[:2]
    with pytest.raises(RecipeError, match=r"\{\} stands for forget.concept, which this run does not have"):
        placed(file, concept_names(["a", "b"]))
    assert placed(read("a dog\n", "p.txt"), []).texts == ("a dog",)


@pytest.mark.parametrize(
    ("name", "row"), [("p.txt", "{}"), ("p.csv", 'id,caption,seed\n1,"{}",5'), ("p.tsv", "text\tid\n{}\t3")]
)
def test_training_reads_the_same_files(tmp_path, name, row):
    (tmp_path / f"keep-{name}").write_text(row.replace("{}", "A  boat, blue"))
    (tmp_path / name).write_text(row.replace("{}", "Cats on a  mat"))
    forget = [{"concept": "cat", "captions": name}, {"concept": "mat", "prompts": name}]
    plan = plan_prompts(forget, ["dog", "rug"], f"keep-{name}", folders=[tmp_path])
    assert (plan.forget, plan.cover, plan.retain) == (("Cats on a mat",), ("Dogs on a rug",), ("A boat, blue",))
    plan = plan_prompts(name, f"keep-{name}", f"keep-{name}", folders=[tmp_path])
    assert (plan.forget, plan.cover) == (("Cats on a mat",), ("A boat, blue",))
    plan = plan_prompts({"keywords": name, "prompts": f"keep-{name}"}, None, ["x"], folders=[tmp_path])
    assert (plan.forget, plan.cover) == (("Cats on a mat A boat, blue",), ("A boat, blue",))


def test_a_table_without_a_column_of_prompts_is_refused_by_training_too(tmp_path):
    (tmp_path / "p.csv").write_text("title,Seed\na,1\n")
    with pytest.raises(
        RecipeError, match=r"^retain: .*p.csv, line 1: no column named prompt, caption or text; .* title, seed"
    ):
        plan_prompts("a", "b", str(tmp_path / "p.csv"))
