"""One file that could not be read, of another version or with one damaged bit, took the others with it or passed unseen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import MEASURES, make_run

from depthcb import report
from depthcb.report.groups import groups, layer_rows, run_line
from depthcb.run import Run, read_runs, write_header, write_row
from depthcb_recipes.backbones import zoo
from depthcb_recipes.studies.result import read_result, write_result


@pytest.fixture
def run() -> Run:
    return make_run(0, "AdamW", "equal-step", 4, 2)


def write(run: Run, folder: Path) -> None:
    for name, record in run.records.items():
        write_header(folder, name, record.callback, 0, record.settings, record.fit)
        for row in record.rows:
            write_row(folder, name, row)


def test_a_record_of_a_later_version_is_named_and_the_rest_read(run: Run, tmp_path: Path) -> None:
    write(run, tmp_path)
    path = tmp_path / "depthcb" / "equal_step.jsonl"
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))
    with pytest.warns(UserWarning, match=r"equal_step\.jsonl is left out: it has version 3, .* reads up to 2: update"):
        (found,) = read_runs(tmp_path)
    assert found.profiles == run.profiles


@pytest.mark.parametrize("damage", [lambda head: head.pop("settings"), lambda head: head.update(fit=3)])
def test_a_damaged_header_is_named_and_the_rest_read(damage: Any, run: Run, tmp_path: Path) -> None:
    write(run, tmp_path)
    path = tmp_path / "depthcb" / "equal_step.jsonl"
    first, *rest = path.read_text().splitlines()
    head = json.loads(first)
    damage(head)
    path.write_text("\n".join([json.dumps(head), *rest]))
    with pytest.warns(UserWarning, match="depthcb") as caught:
        (found,) = read_runs(tmp_path)
    assert [str(w.message).partition("jsonl")[2] for w in caught] == [
        ", line 1 is damaged, perhaps by a killed process: it is ignored.",
        " is left out: line 2 is a row without a preceding header.",
    ]
    assert found.profiles == run.profiles


@pytest.mark.filterwarnings("ignore:.*damaged", "ignore:.*left out")
def test_one_damaged_bit_of_a_record_leaves_it_readable(run: Run, tmp_path: Path) -> None:
    write_header(tmp_path, "depth", "DepthProfile", 0, run.records["depth"].settings)
    write_row(tmp_path, "depth", run.records["null"].rows[0])
    path = tmp_path / "depthcb" / "depth.jsonl"
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        for found in read_runs(tmp_path):
            (group,) = groups([found])
            assert run_line(found, group)
            layer_rows(group, group.measures)


def test_a_damaged_profile_is_named_and_the_rest_read(run: Run, tmp_path: Path) -> None:
    write(run, tmp_path)
    row = json.loads(json.dumps(run.records["depth"].rows[1]))
    row["profiles"]["cka"]["change"][0] = -1.0
    write_row(tmp_path, "depth", row)
    (found,) = read_runs(tmp_path)
    with pytest.warns(
        UserWarning, match="the cka profile of step 40 is damaged and left out: .* must be finite and >= 0"
    ):
        assert [p.step for p in found.profiles["cka"]] == [20]
    assert found.profiles["cka_normalized"] == run.profiles["cka_normalized"]


def test_unreadable_files_are_named_and_linked_ones_read(run: Run, tmp_path: Path) -> None:
    write(run, tmp_path / "elsewhere")
    folder = tmp_path / "runs" / "a" / "depthcb"
    folder.mkdir(parents=True)
    (folder / "depth.jsonl").symlink_to(tmp_path / "elsewhere" / "depthcb" / "depth.jsonl")
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (folder / "equal_step.jsonl").mkdir()
    (tmp_path / "runs" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "up").symlink_to(tmp_path / "runs")
    with pytest.warns(UserWarning, match="depthcb") as caught:
        linked_file, linked_folder = read_runs(tmp_path / "runs")
    told = sorted(str(w.message).partition("depthcb/")[2] for w in caught)
    assert told == [
        "equal_step.jsonl cannot be read and is left out: Is a directory.",
        "gone.jsonl cannot be read and is left out: No such file or directory.",
    ]
    assert linked_file.profiles == linked_folder.profiles == run.profiles
    assert list(linked_folder.records) == sorted(run.records)


def test_an_unknown_measure_is_shown_under_its_name(run: Run, tmp_path: Path) -> None:
    text = json.dumps(run.to_dict()).replace('"cka_normalized"', '"of_a_plugin"')
    for measure in ("title", "unit"):
        text = text.replace(f'"{measure}": "normalised', f'"was_{measure}": "normalised')
    other = Run.from_dict(json.loads(text))
    assert list(other.profiles) == [MEASURES[0], "of_a_plugin"]
    report.write_html([other], tmp_path / "a.html")
    report.write_png([other], tmp_path / "a.png")
    assert "of_a_plugin" in (tmp_path / "a.html").read_text()


def test_every_damaged_bit_of_a_result_is_named(tmp_path: Path) -> None:
    (folder,) = (Path(__file__).parents[1] / "fixtures" / "version_0_1" / "study-last" / "runs").glob("bc*")
    result = read_result(folder)
    assert result is not None
    write_result(tmp_path, result)
    assert read_result(tmp_path) == result
    whole = (tmp_path / "result.json").read_bytes()
    assert len(whole) > 10_000
    for position in range(0, len(whole), len(whole) // 200):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        if damaged.split() == whole.split() or json_of(damaged) == json_of(whole):  # space between the values
            continue
        (tmp_path / "result.json").write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"result\.json is damaged .*: the run is made again"):
            assert read_result(tmp_path) is None


def json_of(text: bytes | bytearray) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_a_damaged_model_of_the_zoo_is_named_and_missing(tmp_path: Path) -> None:
    for name in zoo.FILES:
        (tmp_path / name).write_bytes(name.encode() * 100)
    sums = {name: zoo.checksum(tmp_path / name) for name in zoo.FILES}
    (tmp_path / zoo.REPORT).write_text(json.dumps({"sha256": sums}))
    assert zoo.is_pretrained(tmp_path)
    for name in zoo.FILES:
        shutil.copy(tmp_path / name, tmp_path / "kept")
        content = bytearray((tmp_path / name).read_bytes())
        content[50] ^= 4
        (tmp_path / name).write_bytes(content)
        with pytest.warns(UserWarning, match=rf"is damaged \({name}\): pretrain it again"):
            assert not zoo.is_pretrained(tmp_path)
        shutil.move(tmp_path / "kept", tmp_path / name)
    (tmp_path / zoo.REPORT).write_text(json.dumps({"model": "of version 0.1"}))
    assert zoo.is_pretrained(tmp_path)
    (tmp_path / zoo.REPORT).write_text("{")
    with pytest.warns(UserWarning, match=r"is damaged \(pretraining\.json\)"):
        assert not zoo.is_pretrained(tmp_path)
