"""Bad input: one line, exit status 2, nothing written, nothing compiled."""

import json
import sys
from unittest import mock

import pytest

import elegans as el
import synthetic
from elegans import specs
from elegans.errors import StoreError
from elegans.loading import from_yaml, load_study, parse_overrides
from elegans.store import Store
from running import elegans

GOOD = """
run:
  task: {kind: addition, length: 4}
  model: {kind: transformer, layers: 1, d_model: 16, heads: 2}
  optim: {kind: adamw, lr: 1e-3}
  batch: 8
  steps: 10
"""
BAD_FILES = {
    "unknown task": (GOOD.replace("addition", "additon"), "task.kind", "additon", "allowed: activity_selection, addition, b"),
    "unknown field": (GOOD.replace("d_model", "width"), "model.width", "16", "d_model"),
    "unknown key": (GOOD + "swep: {}\n", "swep", "{}", "sweep"),
    "wrong type": (GOOD.replace("steps: 10", "steps: ten"), "steps", "ten", "whole number"),
    "fraction for a count": (GOOD.replace("batch: 8", "batch: 8.5"), "batch", "8.5", "whole number"),
    "negative width": (GOOD.replace("d_model: 16", "d_model: -16"), "d_model", "-16", ">= 1"),
    "indivisible width": (GOOD.replace("d_model: 16", "d_model: 15"), "d_model", "15", "multiple of heads=2"),
    "empty sweep": (GOOD + "sweep: {optim.lr: []}\n", "optim.lr", "[]", "at least one value"),
    "a sweep that is a list": (GOOD + "sweep: [1]\n", "sweep", "[1]", "dotted fields"),
    "a sweep of numbers": (GOOD + "sweep: {1: [2]}\n", "sweep", "{1: [2]}", "dotted fields"),
    "sweep of no list": (GOOD + "sweep: {optim.lr: 1e-3}\n", "optim.lr", "0.001", "list"),
    "sweep of an unknown field": (GOOD + "sweep: {optim.rate: [1]}\n", "optim.rate", "rate", "lr"),
    "duplicate key": (GOOD + "  steps: 20\n", "bad.yaml", "bad.yaml", "duplicate key"),
    "no YAML": ("run: [", "bad.yaml", "bad.yaml", "no YAML"),
    "no run": ("sweep: {}\n", "run", "None", "must map"),
    "zero steps": (GOOD.replace("steps: 10", "steps: 0"), "steps", "0", ">= 1"),
    "no length": (GOOD.replace("  steps: 10\n", ""), "steps", "None", "exactly one of"),
    "two lengths": (GOOD + "  flops: 1e9\n", "steps", "flops", "exactly one of"),
    "NaN learning rate": (GOOD.replace("1e-3", ".nan"), "optim.lr", "nan", "finite"),
    "infinite learning rate": (GOOD.replace("1e-3", ".inf"), "optim.lr", "inf", "finite"),
    "absurd width": (GOOD.replace("d_model: 16", "d_model: 65536"), "memory", "bytes", "lower model sizes"),
    "absurd layers": (GOOD.replace("layers: 1", "layers: 1000000"), "layers", "1000000", "<= 256"),
    "absurd batch": (GOOD.replace("batch: 8", "batch: 1000000000"), "batch", "1000000000", "<= 1e+06"),
    "absurd steps": (GOOD.replace("steps: 10", "steps: 10000000000"), "steps", "10000000000", "<"),
    "absurd length": (GOOD.replace("length: 4", "length: 100000"), "length", "100000", "<= 4096"),
    "empty part": (GOOD.replace("length: 4", "length: 1"), "split", "3 contents", "empty"),
    "a parent of another width": (
        GOOD + "  after: {task: {kind: addition, length: 4}, model: {kind: transformer, layers: 1, d_model: 8, heads: 2}, steps: 5}\n",
        *("after", "blocks.0.attn.W_K [2, 8, 4]", "[2, 16, 8]"),
    ),
    "a step that a parent does not keep": (GOOD + "  after_step: 3\n", "after_step", "3", "give its parent"),
    "unknown weights": (GOOD + "  trained: [block.*]\n", "trained", "block.*", "blocks.*.attn.W_Q"),
    "a task that an instrument cannot ask": (
        GOOD + "instruments: [{kind: evaluate, task: {kind: sorting, length: 3}}]\n",
        *("task", "sorting", "not among the network's"),
    ),
    "epochs of fresh data": (GOOD.replace("steps: 10", "epochs: 3"), "epochs", "3", "train_set"),
}


def assert_refused(answer, *said):
    lines = answer.err.strip().splitlines()
    assert answer.status == 2, answer
    assert len(lines) == 1, answer.err
    for word in said:
        assert word in lines[0]
    assert answer.out == "" and answer.compiled == 0


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_yaml(name, tmp_path):
    text, *said = BAD_FILES[name]
    (tmp_path / "bad.yaml").write_text(text)
    assert_refused(elegans("run", tmp_path / "bad.yaml", "--store", tmp_path / "store", "--memory", "4GiB"), *said)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=fast"], ["optim.lr", "fast", "finite number"]),
        (["optim.lr="], ["optim.lr", "at least one value"]),
        (["seed=4..0"], ["seed", "4..0", "ascending"]),
        (["seed=0..x"], ["seed", "0..x", "whole number"]),
        (["seed"], ["seed", "field=value"]),
        (["model.mlp.gain=2"], ["model.mlp.gain", "gain", "ratio"]),
        (["steps=5", "steps=6"], ["steps", "twice"]),
        (["label=x{sed}"], ["label.sed", "'sed'", "seed"]),
        (["label=x{model.position.kind}", "--plan"], ["label.model.position.kind", "'kind'", "theta"]),
        (["--device", "tpu"], ["device", "tpu", "cpu"]),
        (["--memory", "plenty"], ["memory", "plenty", "8GiB"]),
        (["--resume"], ["nothing to resume"]),
        (["--with", "nowhere.py"], ["nowhere.py", "exists"]),
        (["--small"], ["small", "no small version"]),
        (["--minutes", "nan"], ["--minutes", "nan"]),
        (["--memoty", "1GiB"], ["No such option", "--memoty"]),
    ],
)
def test_bad_words(words, said, tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    assert_refused(elegans("run", tmp_path / "good.yaml", *words, "--store", tmp_path / "store"), *said)
    assert not (tmp_path / "store").exists()


def test_what_words_of_the_command_line_mean():
    """A path with dots is no range."""
    axes = parse_overrides(["task.graphs=../g.g6,a..b", "seed=-1..2,7", "model.position=rotary,null"])
    assert axes == {"task.graphs": ["../g.g6", "a..b"], "seed": [-1, 0, 1, 2, 7], "model.position": ["rotary", None]}


def test_what_is_off_is_called_none_as_tables_call_it(tmp_path):
    (tmp_path / "none.yaml").write_text(GOOD.replace("heads: 2", "heads: 2, position: none"))
    study = from_yaml(tmp_path / "none.yaml")
    assert [run.model.position for run in study.runs] == [None]
    shown = study.override(parse_overrides(["model.position=rotary,none", "label=none"])).runs
    assert [run.model.position and run.model.position.kind for run in shown] == ["rotary", None]
    assert [run.label for run in shown] == [None, None]


def test_a_store_without_runs_is_listed(tmp_path):
    Store.create(tmp_path / "store")
    assert elegans("ls", tmp_path / "store", "--json").out.strip() == "[]"


def test_a_plan_asks_instruments_too(tmp_path):
    text, *said = BAD_FILES["a task that an instrument cannot ask"]
    (tmp_path / "bad.yaml").write_text(text)
    assert_refused(elegans("run", tmp_path / "bad.yaml", "--store", tmp_path / "store", "--plan"), *said)


def test_a_file_of_one_graph(tmp_path):
    """A complete graph is the same under all names: nothing is left to validate and test on."""
    (tmp_path / "one.g6").write_bytes(bytes([63 + 7, *[63 + 63] * 3, 63 + 0b111000]))
    task = f"{{kind: breadth_first_search, vertices: 7, graphs: {tmp_path / 'one.g6'}}}"
    (tmp_path / "bad.yaml").write_text(GOOD.replace("{kind: addition, length: 4}", task))
    answer = elegans("run", tmp_path / "bad.yaml", "--store", tmp_path / "store", "--memory", "4GiB")
    assert_refused(answer, "split", "1 labelled graphs", "would be empty")
    assert not (tmp_path / "store").exists()


def test_unknown_study():
    assert_refused(elegans("run", "cary"), "study", "cary", "carry")


def test_a_store_path_that_is_a_file(tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "taken").write_text("mine")
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        assert_refused(elegans("run", tmp_path / "good.yaml", "--store", path), "taken", "file")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_with_other_things(tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    assert_refused(elegans("run", tmp_path / "good.yaml", "--store", tmp_path), "other things")
    assert [p.name for p in tmp_path.iterdir()] == ["good.yaml"]


@pytest.mark.parametrize("command", [["ls"], ["sql", "select 1"], ["measure", "probe"], ["report"], ["draw"], ["export", "abc", "out"]])
def test_no_store(command, tmp_path):
    name, *rest = command
    words = [name, rest[0], tmp_path / "none"] if name == "measure" else [name, tmp_path / "none", *rest]
    assert_refused(elegans(*words), "no store here")


def test_a_newer_store(tmp_path):
    (tmp_path / "format.json").write_text(json.dumps({"format": 999}))
    (tmp_path / "good.yaml").write_text(GOOD)
    for words in (["ls", tmp_path], ["run", tmp_path / "good.yaml", "--store", tmp_path]):
        assert_refused(elegans(*words), "newer", "999")


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"format": null}', '{"format": "1"}', ""])
def test_a_damaged_format(text, tmp_path):
    (tmp_path / "format.json").write_text(text)
    assert_refused(elegans("ls", tmp_path), "format.json" if "1" not in text else "newer")


def test_a_damaged_store(tmp_path):
    """Files cut short, as a full disk leaves them: the line names the file."""
    store = synthetic.make(tmp_path, synthetic.small(), tables=("metrics",))
    for name in ("status.json", "spec.json", "plan.json", "metrics-*.parquet"):
        (path,) = tmp_path.rglob(name)
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        assert_refused(elegans("sql", tmp_path, "select 1"), path.name)
        path.write_bytes(whole)
    (tmp_path / "rows" / "probe").mkdir(parents=True)
    (tmp_path / "rows" / "probe" / "c0ffee000000.parquet").write_bytes(b"PAR1")
    assert_refused(elegans("measure", "probe", tmp_path), "c0ffee000000.parquet", "unreadable")
    with pytest.raises(StoreError, match="no table 'nope'; there are runs, metrics"):
        store.table("nope")
    assert not store.has("nope") and not store.has("positions")


def test_a_place_where_no_folder_can_be(tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    answer = elegans("run", tmp_path / "good.yaml", "--store", "/proc/x", "--memory", "4GiB")
    assert answer.status == 2 and "/proc/x" in answer.err.splitlines()[-1] and "another --store" in answer.err


def test_an_export_into_a_folder_with_other_things(tmp_path):
    synthetic.make(tmp_path / "store", synthetic.small(), tables=("metrics",))
    for taken in (tmp_path, tmp_path / "store" / "format.json"):
        assert_refused(elegans("export", tmp_path / "store", synthetic.small()[0].id, taken), "folder", "empty")


def test_nothing_to_draw(tmp_path):
    """No study, an unknown one, no rows, and a folder that is a file: nothing is written."""
    store, taken = tmp_path / "store", tmp_path / "taken"
    (store / "cohorts").mkdir(parents=True)
    (store / "format.json").write_text('{"format": 1}')
    taken.write_text("mine")
    for words, said in (
        ([], ["no study", "--study"]),
        (["--study", "cary"], ["study", "cary", "carry"]),
        (["--study", "carry"], ["no rows"]),
        (["--study", "iteration_heads.law"], ["no rows of evaluate"]),
        ([taken, "--study", "carry"], ["folder", "taken"]),
        ([taken / "below", "--study", "carry"], ["folder", "below"]),
    ):
        assert_refused(elegans("draw", store, *words), *said)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cohorts", "format.json", "store", "taken"] and taken.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "additon"], ["task", "additon", "allowed: activity_selection, addition, b"]),
        (["show", "addition", "length=x"], ["length", "x", "whole number"]),
        (["show", "addition", "length=1,2"], ["length", "1,2", "one value"]),
        (["show", "addition", "split.train=0.99"], ["validation", "0.05", "nothing is left"]),
        (["show", "parity", "shortest=20"], ["shortest", "20", "length=16"]),
        (["bench", "--replicas", "0"], ["replicas", "0", "above 0"]),
        (["bench", "--d-model", "13"], ["d_model", "13", "heads=4"]),
        (["bench", "--seconds", "nan"], ["seconds", "nan", "above 0"]),
        (["show", "addition", "--examples", "-1"], ["--examples", "-1"]),
        (["shwo"], ["No such command", "shwo"]),
        (["show"], ["task", "show --help"]),
    ],
)
def test_other_commands(words, said):
    assert_refused(elegans(*words), *said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ndef broken(:\n", ["SyntaxError in line 2"]),
        ("x = 1\nimport nowhere_at_all\n", ["ModuleNotFoundError in line 2", "nowhere_at_all"]),
        ("def f():\n    return 1 / 0\n\nf()\n", ["ZeroDivisionError in line 2", "division by zero"]),
        ("import sys\nsys.exit(3)\n", ["SystemExit in line 2"]),
        ("x = 'caf\u00e9'\n", ["SyntaxError"]),
    ],
)
def test_a_file_that_python_refuses(text, said, tmp_path, monkeypatch):
    """One line says where; and a file that was mended is read again."""
    monkeypatch.delitem(sys.modules, "refused", raising=False)
    file = tmp_path / "refused.py"
    file.write_bytes(text.encode("latin-1"))
    assert_refused(elegans("run", file, "--store", tmp_path / "store"), "refused.py", *said)
    file.write_text("import elegans as el\nstudy = []\n", encoding="utf-8")
    assert_refused(elegans("run", file, "--store", tmp_path / "store"), "runs", "at least one run")


def test_a_folder_where_nothing_can_be_written(tmp_path):
    """Whatever the reason: one line with the path, and no half-written file."""
    store = synthetic.make(tmp_path / "store", synthetic.small()[:2], tables=("metrics",))
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "nowhere" / "a.tar.xz", tmp_path / "folder"):
        answer = elegans("archive", store.path, path)
        assert answer.status == 2 and len(answer.err.splitlines()) == 1 and path.name in answer.err
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_classes_of_one_name_are_refused_before_anything_is_written(tmp_path):
    text = """
import elegans as el

@el.spec
class Transformer(el.Transformer):
    pass

study = [el.Run(el.Addition(length=3), Transformer(layers=1, d_model=8, heads=2), steps=1)]
"""
    (tmp_path / "namesake.py").write_text(text)
    before = {kind: list(classes) for kind, classes in specs._KINDS.items()}
    try:
        for words in ([], ["--plan"]):
            assert_refused(elegans("run", tmp_path / "namesake.py", "--store", tmp_path / "store", *words), "transformer", "taken twice")
    finally:
        specs._KINDS.clear()
        specs._KINDS.update(before)
    assert not (tmp_path / "store").exists()


def test_an_interruption_says_how_to_go_on(tmp_path):
    store = synthetic.make(tmp_path / "store", synthetic.small()[:2], tables=("metrics",))
    with mock.patch.object(Store, "sql", side_effect=KeyboardInterrupt):
        answer = elegans("sql", store.path, "select 1")
    assert (answer.status, answer.out) == (130, "") and "the same command goes on" in answer.err and len(answer.err.splitlines()) == 1


def test_answers_of_sql_are_json_that_every_reader_takes(tmp_path):
    store = synthetic.make(tmp_path / "store", synthetic.small()[:2], tables=("metrics",))
    query = """select sum(step)::hugeint as whole, 1.25::decimal(5, 2) as part, 'nan'::float as lost, [1.0, 'inf'::double] as pair,
      timestamp '2020-01-02' as day, {'a': 'x'} as inner from metrics"""
    (row,) = json.loads(elegans("sql", store.path, query, "--json").out)
    whole = store.sql("select step from metrics")["step"].to_pylist()
    assert row == {"whole": sum(whole), "part": 1.25, "lost": None, "pair": [1.0, None], "day": "2020-01-02 00:00:00", "inner": {"a": "x"}}


def test_columns_of_one_name_are_told_apart(tmp_path):
    store = synthetic.make(tmp_path / "store", synthetic.small()[:2], tables=("metrics",))
    rows = store.sql("select 1 as a, 2 as a, 3 as a_1, 4 as a, 5 as b")
    assert rows.to_pylist() == [{"a": 1, "a_2": 2, "a_1": 3, "a_3": 4, "b": 5}]
    said = elegans("sql", store.path, "select 'x' as a, 'y' as a").out.split()
    assert said == ["a", "a_1", "x", "y"]


def test_a_query_sees_the_tables_that_it_names_and_all_where_it_names_none(tmp_path):
    store = synthetic.make(tmp_path / "store", synthetic.small()[:2], tables=("metrics", "probe"))
    assert store.sql("select run from METRICS natural join Runs").num_rows == store.table("metrics").num_rows
    assert set(store.sql("show tables")["name"].to_pylist()) == {*store.tables()} == {"runs", "metrics", "probe"}


def test_no_runs_are_refused(tmp_path):
    with pytest.raises(el.Invalid, match=r"a list of elegans\.Run, one at least"):
        el.train([], tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_file_without_a_name_of_its_own_keeps_results_under_the_file_s(tmp_path, monkeypatch):
    """As the README has it: mine.py -> runs/mine, and its small version beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_unnamed", raising=False)
    (tmp_path / "mine_unnamed.py").write_text("""
import elegans as el
run = el.Run(el.Addition(length=3), el.Transformer(layers=1, d_model=8, heads=2), batch=4, steps=1)
study = el.Study([run])
small = el.Study([run], name="by_hand")
""")
    assert load_study("mine_unnamed.py").name == "mine_unnamed" and load_study("mine_unnamed.py", small=True).name == "by_hand"


def test_a_plan_says_where_its_bytes_are_bounds(tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    for memory, bounds in (("4GiB", False), ("100KB", True)):
        answer = elegans("run", tmp_path / "good.yaml", "seed=0..3", "--store", tmp_path / "store", "--memory", memory, "--plan")
        assert answer.status == 0 and ("bytes are bounds" in answer.err) == bounds


def test_a_plan_says_that_its_seconds_are_without_instruments(tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "measured.yaml").write_text(GOOD + "\ninstruments: [probe, {kind: probe, name: second}, transition]\n")
    for name, said in (("good", False), ("measured", True)):
        answer = elegans("run", tmp_path / f"{name}.yaml", "--store", tmp_path / "store", "--memory", "4GiB", "--plan")
        assert answer.status == 0 and ("instruments come on top: probe, transition" in answer.err) == said, answer.err


def test_evaluation_without_a_task_to_measure_on(tmp_path):
    store = synthetic.make(tmp_path / "store", synthetic.small()[:2], tables=("metrics",))
    assert_refused(elegans("measure", "evaluate", store.path), "task", "None", "no run goes on from another")
    assert "no weights" in elegans("measure", "evaluate", store.path, "own=true").err


def test_a_task_that_branches_on_what_it_draws_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "branching", raising=False)
    (tmp_path / "branching.py").write_text("""
import jax
import elegans as el

@el.spec
class Branching(el.Addition):
    def sample(self, key, data):
        if jax.random.bernoulli(key):
            key = key
        return super().sample(key, data)

study = [el.Run(Branching(length=3), el.Transformer(layers=1, d_model=8, heads=2), steps=1)]
""")
    answer = elegans("run", tmp_path / "branching.py", "--store", tmp_path / "store")
    assert answer.status == 2 and len(answer.err.splitlines()) == 1
    assert "branching.sample" in answer.err and "jnp.where" in answer.err and not (tmp_path / "store").exists()


def test_figures_that_nobody_can_call_are_refused():
    with pytest.raises(el.Invalid, match="figures"):
        el.Study([synthetic.small()[0]], figures={"where": print})
