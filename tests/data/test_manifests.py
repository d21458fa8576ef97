"""Manifests and noises, ours and the reference workflow's: real files in, faults as reasons."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from oneshot_fast.data.manifests import find_manifests, read_manifest, read_manifests
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.data.records import pair_id
from oneshot_fast.errors import DataError

NOISE = torch.arange(3 * 4 * 2 * 2, dtype=torch.float32).reshape(3, 4, 2, 2)


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((x.encode() if isinstance(x, str) else x) + b"\n" for x in lines))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a shard of three noises; its target images lie beside it."""
    folder = tmp_path / "data" / "run"
    (folder / "noises").mkdir(parents=True)
    save_file({"z": NOISE}, folder / "noises" / "0.safetensors")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "data" / "a.png")
    return folder


def row(**changes: object) -> str:
    fields = {
        "id": "f00",
        "prompt": "a cat",
        "target_image_path": "../a.png",
        "noise_path": "noises/0.safetensors",
        "noise_index": 1,
        "loss": 0.5,
    }
    return json.dumps({k: v for k, v in (fields | changes).items() if v != "DROP"})


def test_our_manifest(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run / "manifest.jsonl", row(), "", row(id="f01", noise_index=2))
    pairs, failures = read_manifest(run / "manifest.jsonl")
    assert not failures and [(p.id, p.prompt, p.noise_index) for p in pairs] == [
        ("f00", "a cat", 1),
        ("f01", "a cat", 2),
    ]
    assert all(p.image_path.is_absolute() and p.noise_path.is_absolute() for p in pairs)
    assert pairs[0].image_path.samefile(run.parent / "a.png")
    for index, pair in enumerate(pairs, 1):
        torch.testing.assert_close(
            read_noise(pair.noise_path, pair.noise_index), NOISE[index], rtol=0, atol=0
        )
    monkeypatch.chdir(run)
    relative, _ = read_manifest(Path("manifest.jsonl"))
    monkeypatch.chdir("/")
    assert (
        read_noise(relative[1].noise_path, relative[1].noise_index).equal(NOISE[2])
        and relative[1].image_path.is_file()
    )


def test_a_moved_or_linked_run_still_works(run: Path, tmp_path: Path) -> None:
    write(run / "manifest.jsonl", row())
    (tmp_path / "link").symlink_to(run)
    pair = read_manifest(tmp_path / "link" / "manifest.jsonl")[0][0]
    assert read_noise(pair.noise_path, pair.noise_index).equal(NOISE[1])
    (tmp_path / "data").rename(tmp_path / "moved")
    pairs, failures = read_manifest(tmp_path / "moved" / "run" / "manifest.jsonl")
    assert read_noise(pairs[0].noise_path, pairs[0].noise_index).equal(NOISE[1]) and not failures


def reference_row(noise: str, image: str = "../a.png", **changes: object) -> str:
    return row(
        id="DROP",
        noise_path="DROP",
        noise_index="DROP",
        best_input_noise_path=noise,
        target_image_path=image,
        **changes,
    )


@pytest.mark.parametrize(
    "stored",
    [
        NOISE[:1],
        NOISE[0],
        NOISE[0].to(torch.float64).requires_grad_(),
        NOISE[0].half(),
        NOISE[0].permute(1, 2, 0).contiguous().permute(2, 0, 1),
        {"noise": NOISE[:1], "prompt": "a cat", "seed": 3, "steps": torch.tensor([1, 2])},
    ],
)
def test_reference_noises(run: Path, stored: object) -> None:
    torch.save(stored, run / "n.pt")
    write(run / "manifest.jsonl", reference_row("n.pt"))
    (pair,), failures = read_manifest(run / "manifest.jsonl")
    assert pair.noise_index is None and not failures
    assert pair.id == pair_id("../a.png", "a cat")
    noise = read_noise(pair.noise_path, pair.noise_index)
    assert noise.equal(NOISE[0]) and noise.dtype == torch.float32
    assert noise.is_contiguous() and not noise.requires_grad


def test_reference_paths(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    torch.save(NOISE[0], run / "n.pt")
    torch.save(NOISE[1], tmp_path / "cwd" / "n.pt")
    torch.save(NOISE[2], tmp_path / "cwd" / "m.pt")
    Image.new("L", (2, 2)).save(tmp_path / "cwd" / "c.png")
    absolute = reference_row(str(run / "n.pt"), str(run.parent / "a.png"))
    lines = [reference_row("n.pt"), reference_row("m.pt", "c.png"), absolute]
    monkeypatch.chdir(tmp_path / "cwd")
    pairs, failures = read_manifest(write(run / "manifest.jsonl", *lines))
    assert not failures
    assert [float(read_noise(p.noise_path, p.noise_index)[0, 0, 0]) for p in pairs] == [
        0,
        32,
        0,
    ]  # the manifest's comes first
    assert pairs[1].image_path == tmp_path / "cwd" / "c.png"
    # Paths of our own manifests never depend on the working directory.
    ours = write(run / "ours.jsonl", row(), row(target_image_path="c.png"))
    assert [f.line for f in read_manifest(ours)[1]] == [2]


def test_repeated_ids_stay_apart(run: Path) -> None:
    names = ["a", "a-1", "a", "a"]
    pairs, _ = read_manifest(write(run / "manifest.jsonl", *(row(id=name) for name in names)))
    assert [p.id for p in pairs] == ["a", "a-1", "a-2", "a-3"]


def test_several_captions(run: Path) -> None:
    torch.save(NOISE[0], run / "n.pt")
    texts = ["a cat", "one cat"]
    lines = row(prompt="one cat", prompts=texts), row(id="2", prompts=None)
    path = write(run / "manifest.jsonl", *lines, reference_row("n.pt", prompt=texts))
    pairs, failures = read_manifest(path)
    assert not failures and [p.prompt for p in pairs] == ["one cat", "a cat", "a cat"]
    assert [p.prompts for p in pairs] == [tuple(texts), (), tuple(texts)]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "broken JSON"),
        ("[]", "not a JSON object"),
        (b"\xff", "invalid UTF-8"),
        (row(prompt=""), "'prompt' is empty"),
        (row(prompt=None), "'prompt' must be a string"),
        (row(prompts=[]), "'prompts' is an empty list"),
        (row(prompts=["a", 3]), "'prompts[1]' must be a string, not int"),
        (row(id=7), "'id' must be a string"),
        (row(target_image_path="DROP"), "missing field 'target_image_path'"),
        (row(noise_path="DROP"), "missing field 'noise_path'"),
        (row(noise_path=None), "'noise_path' must be a string"),
        (row(target_image_path="../b.png"), "no such file: ../b.png"),
        (row(target_image_path=".."), "no such file: "),
        (row(noise_path="noises/1.safetensors"), "no such file: noises/1"),
        (row(noise_path="../a.png"), "neither .safetensors nor .pt"),
        (row(noise_index=-1), "'noise_index' must be"),
        (row(noise_index=True), "'noise_index' must be"),
        (row(noise_index=1.0), "'noise_index' must be"),
        (row(noise_index="1"), "'noise_index' must be"),
        (row(noise_path="n.pt"), "'noise_index' needs a .safetensors"),
        (reference_row("m.pt"), "no such file: m.pt"),
    ],
)
def test_a_bad_manifest_line_fails_alone(run: Path, bad: str | bytes, reason: str) -> None:
    torch.save(NOISE[0], run / "n.pt")
    path = write(run / "manifest.jsonl", row(), bad, row(id="last"))
    pairs, failures = read_manifest(path)
    assert [p.id for p in pairs] == ["f00", "last"] and [f.line for f in failures] == [2]
    assert reason in failures[0].reason


def test_unusable_manifests(run: Path) -> None:
    for path in (run / "none.jsonl", run):
        with pytest.raises(DataError, match=r"no such manifest file"):
            read_manifest(path)
    with pytest.raises(DataError, match=r"is empty"):
        read_manifest(write(run / "manifest.jsonl", ""))
    with pytest.raises(DataError, match=r"1 failed; the first, line 2: missing field 'prompt'"):
        read_manifest(write(run / "manifest.jsonl", "", row(prompt="DROP")))


class Payload:
    """Unpickling it would create the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickled_code_is_refused_and_never_run(tmp_path: Path, wrap: bool, zipped: bool) -> None:
    payload: object = Payload(tmp_path / "ran")
    stored = {"noise": NOISE[0], "extra": payload} if wrap else payload
    torch.save(stored, tmp_path / "n.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match="pickled code is never run") as caught:
        read_noise(tmp_path / "n.pt")
    assert not (tmp_path / "ran").exists() and "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (NOISE, r"found torch.float32 \[3, 4, 2, 2\]"),
        (NOISE[0, 0], r"expected one float noise \[C, h, w\]"),
        (NOISE[:0], "expected one"),
        (torch.zeros(4, 0, 2), "expected one"),
        (NOISE[0].long(), "found torch.int64"),
        (NOISE[0].to(torch.complex64), "found torch.complex64"),
        (NOISE[0].to_sparse(), "expected one"),
        ({"a": NOISE[0], "b": NOISE[:1]}, r"\[4, 2, 2\], torch.float32 \[1, 4, 2, 2\]"),
        ({}, "found no tensor"),
        ([NOISE[0]], "found no tensor"),
        (NOISE[0] / 0, "NaN or infinite"),
        (NOISE[0].double() * 1e300, "NaN or infinite"),  # infinite in float32
        (b"", "cannot be read as tensors"),
        (b"noise", "n.pt: "),
        (b"PK\3\4" + bytes(100), "n.pt: "),
    ],
)
def test_bad_pt_noises(tmp_path: Path, stored: object, reason: str) -> None:
    path = tmp_path / "n.pt"
    if isinstance(stored, bytes):
        path.write_bytes(stored)
    else:
        torch.save(stored, path)
    with pytest.raises(DataError, match=reason) as caught:
        read_noise(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_shard_dtypes_and_single_noises(tmp_path: Path, dtype: torch.dtype) -> None:
    for z, index in ((NOISE, 1), (NOISE[1], None), (NOISE[1:2], None)):
        save_file({"z": z.to(dtype), "other": torch.zeros(1)}, tmp_path / "n.safetensors")
        noise = read_noise(tmp_path / "n.safetensors", index)
        assert noise.dtype == torch.float32 and noise.equal(NOISE[1])


@pytest.mark.parametrize(
    ("tensors", "index", "reason"),
    [
        ({"z": NOISE}, 3, r"no row 3: tensor 'z' is \[3, 4, 2, 2\]"),
        ({"z": NOISE}, None, "expected one"),
        ({"z": NOISE[0]}, 0, r"found torch.float32 \[2, 2\]"),
        ({"z": torch.tensor(1.0)}, 0, "no row 0"),
        ({"q": NOISE}, 0, "no tensor 'z' but q"),
        ({"z": NOISE.int()}, 0, "found torch.int32"),
        ({"z": NOISE / NOISE}, 0, "NaN or infinite noise in row 0"),
    ],
)
def test_bad_shards(
    tmp_path: Path, tensors: dict[str, torch.Tensor], index: int | None, reason: str
) -> None:
    save_file(tensors, tmp_path / "n.safetensors")
    with pytest.raises(DataError, match=reason):
        read_noise(tmp_path / "n.safetensors", index)


def test_damaged_shards(tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    save_file({"z": NOISE}, path)
    whole = path.read_bytes()
    for body in (b"", b"z", b"\xff" * 64, whole[:-1], whole[:40]):
        path.write_bytes(body)
        with pytest.raises(DataError, match="cannot be read as tensors"):
            read_noise(path, 0)
    with pytest.raises(DataError, match="cannot be read as tensors"):
        read_noise(tmp_path / "none.safetensors", 0)


def test_only_the_row_is_read(tmp_path: Path) -> None:
    """A NaN in another row does not matter, and a 64 MB shard costs no 64 MB."""
    rows = torch.zeros(1024, 4, 64, 64)
    rows[0] = float("nan")
    save_file({"z": rows}, tmp_path / "n.safetensors")
    before = anonymous_kib()
    noises = [read_noise(tmp_path / "n.safetensors", index) for index in (1, 1023)]
    assert anonymous_kib() - before < 8 << 10 and not any(noise.any() for noise in noises)


def anonymous_kib() -> int:
    """Private memory of this process in KiB; pages of a mapped file do not count."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("measures memory through /proc")
    return int(status.read_text().partition("RssAnon:")[2].split()[0])


@pytest.mark.parametrize("form", ["strides", "old strides", "in a dict", "compressed", "sparse"])
def test_a_noise_that_claims_more_than_its_file_has_is_refused(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("n.safetensors" if form == "sparse" else "n.pt")
    huge = torch.zeros(1).expand(4, 100_000, 100_000)  # 160 GB
    if form == "sparse":
        end = 4 * 4 * 10_000 * 10_000
        header = {"z": {"dtype": "F32", "shape": [4, 10_000, 10_000], "data_offsets": [0, end]}}
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    elif form == "compressed":
        torch.save(torch.zeros(4, 512, 512), tmp_path / "plain.pt")
        plain = zipfile.ZipFile(tmp_path / "plain.pt")
        with plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in plain.infolist():
                packed.writestr(entry.filename, plain.read(entry))
    else:
        value = {"z": huge} if form == "in a dict" else huge
        torch.save(value, path, _use_new_zipfile_serialization=form != "old strides")
    with pytest.raises(DataError, match=r"claims [\d,]+ bytes|larger than any latent"):
        read_noise(path)


def test_several_manifests_are_read_as_one(run: Path) -> None:
    other = run.with_name("other")
    shutil.copytree(run, other)
    write(run / "manifest.jsonl", row(), "no JSON", row(id="f01"))
    write(other / "manifest.jsonl", row(noise_index=2), row(id="f02"), row(id="f03", prompt=""))
    paths = find_manifests([[run.parent / "*" / "manifest.jsonl"], [run / "manifest.jsonl"]])
    assert paths == [other / "manifest.jsonl", run / "manifest.jsonl"]
    pairs, failures = read_manifests(paths[::-1])
    assert [(p.id, p.record_id, p.line) for p in pairs] == [
        ("f00", "f00", 1), ("f01", "f01", 3), ("f00-1", "f00", 4), ("f02", "f02", 5),
    ]  # fmt: skip
    assert pairs[2].noise_path.samefile(other / "noises" / "0.safetensors")
    assert [failure.line for failure in failures] == [2, 6]
    assert failures[1].reason.startswith(f"{other / 'manifest.jsonl'}, line 3: ")
    with pytest.raises(DataError, match="no file fits this pattern"):
        find_manifests([[run / "none-*.jsonl"]])
