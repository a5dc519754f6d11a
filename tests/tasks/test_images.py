"""Images: every source gives the same pixels, what is broken is named, the cache survives kills, the stream is random access."""

import gzip
import io
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssmlens.errors import UserError
from ssmlens.tasks import images, stream_of
from ssmlens.tasks.images import ImageConfig, ImageStream, archive, cifar, store

CLASSES = cifar.CLASSES
RNG = np.random.default_rng(0)
N = 20  # images in a batch of CIFAR-10
BATCHES = {
    name: (RNG.integers(0, 256, (N, 3072), np.uint8), [int(i) for i in np.resize(np.arange(10), N)]) for name in cifar.BATCHES
}  # fmt: skip


def binary() -> dict[str, bytes]:
    return {
        f"{name}.bin": np.concatenate([np.array(labels, np.uint8)[:, None], data], 1).tobytes()
        for name, (data, labels) in BATCHES.items()
    }


def python(protocol: int = 2) -> dict[str, bytes]:
    return {
        name: pickle.dumps({"data": data, "labels": labels}, protocol=protocol)
        for name, (data, labels) in BATCHES.items()
    }


def old_python() -> dict[str, bytes]:
    """As Python 2 and numpy 1 wrote them: byte strings for text and data, the module's old name."""
    made = {}
    for name, (data, labels) in BATCHES.items():
        raw = data.tobytes()
        head = b"\x80\x02}q\x00(U\x04data" + b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01bt"
        body = b"R(K\x01K" + bytes([len(data)]) + b"M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        body += (
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
            + len(raw).to_bytes(4, "little")
            + raw
            + b"tb"
        )
        made[name] = head + body + b"U\x06labels](" + b"".join(b"K" + bytes([i]) for i in labels) + b"eu."
    return made


def expected() -> dict[str, np.ndarray]:
    train = np.concatenate([BATCHES[name][0] for name in cifar.BATCHES[:-1]])
    return {
        "train": train.reshape(-1, 3, 1024).transpose(0, 2, 1),
        "test": BATCHES["test_batch"][0].reshape(-1, 3, 1024).transpose(0, 2, 1),
    }


def picture(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def files(size: int = 4, per_class: int = 2, grey: bool = False) -> dict[str, bytes]:
    """SPLIT/CLASS/NAME.png of two classes."""
    rng = np.random.default_rng(1)
    shape = (size, size) if grey else (size, size, 3)
    return {
        f"{split}/{label}/{i:04d}.png": picture(rng.integers(0, 256, shape, np.uint8))
        for split in ("train", "test")
        for label in ("cat", "dog")
        for i in range(per_class)
    }


def folder(path: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def tar(path: Path, content: dict[str, bytes], prefix: str = "") -> Path:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as out:
        for name, one in content.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(one)
            out.addfile(info, io.BytesIO(one))
    raw = data.getvalue()
    if path.suffix in (".gz", ".tgz"):
        raw = gzip.compress(raw, 1)
    elif path.suffix == ".zst":
        raw = pytest.importorskip("zstandard").compress(raw)
    path.write_bytes(raw)
    return path


# --------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("kind", ["binary", "python", "python 5", "old python"])
@pytest.mark.parametrize("packed", ["directory", "within", "tar.gz", "tar"])
def test_every_form_of_cifar_is_the_same_images(tmp_path, kind, packed):
    content = {"binary": binary, "python": python, "python 5": lambda: python(5), "old python": old_python}[kind]()
    if packed in ("directory", "within"):
        folder(
            tmp_path / "c" / ("cifar-10-batches" if packed == "within" else ""), {**content, "readme.html": b"hello"}
        )
        source = tmp_path / "c"
    else:
        source = tar(tmp_path / f"cifar.{packed}", content, "cifar-10-batches/")
    found = images.read(source, cache=tmp_path / "cache")
    assert found.classes == CLASSES
    assert (found.height, found.width, found.channels, found.length) == (32, 32, 3, 1024)
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(found, split).pixels, expected()[split])
    assert found.test.labels.tolist() == BATCHES["test_batch"][1]
    assert found.train.labels.dtype == np.int64
    other = images.read(folder(tmp_path / "other", binary()), cache=tmp_path / "cache")
    assert other.sha256 == found.sha256


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.zst"])
def test_a_folder_and_its_archive_are_the_same_images(tmp_path, suffix):
    content = files()
    one = images.read(folder(tmp_path / "set", content), cache=tmp_path / "cache")
    content["notes.txt"], content["train/.hidden.png"] = b"not an image", b"nor this"
    two = images.read(tar(tmp_path / f"set.{suffix}", content, "./pets/"), cache=tmp_path / "cache")
    assert one.classes == two.classes == ("cat", "dog")
    assert one.sha256 == two.sha256
    pixels = np.asarray(Image.open(io.BytesIO(content["train/dog/0001.png"])))
    np.testing.assert_array_equal(one.train.pixels[3].reshape(4, 4, 3), pixels)
    assert one.train.labels.tolist() == [0, 0, 1, 1]


def test_grey_images_have_one_channel_unless_there_is_colour(tmp_path):
    grey = images.read(folder(tmp_path / "grey", files(grey=True)), cache=tmp_path / "cache")
    assert grey.channels == 1
    mixed = files(grey=True) | {"train/cat/0009.png": files()["train/cat/0000.png"]}
    found = images.read(folder(tmp_path / "mixed", mixed), cache=tmp_path / "cache")
    assert found.channels == 3
    assert (found.test.pixels == grey.test.pixels).all()


def test_jpeg_too(tmp_path):
    content = {name.replace(".png", ".JPEG"): picture(np.full((8, 8, 3), 100, np.uint8), "JPEG") for name in files()}
    found = images.read(folder(tmp_path / "set", content), cache=tmp_path / "cache")
    assert (found.train.pixels == 100).all()


@pytest.mark.parametrize("described", [True, False])
def test_parquet(tmp_path, described):
    datasets = pytest.importorskip("datasets")
    content = files()
    for split in ("train", "test"):
        names = sorted(name for name in content if name.startswith(split))
        rows = {
            "img": [{"bytes": content[name], "path": None} for name in names],
            "label": [int("dog" in name) for name in names],
        }
        table = datasets.Dataset.from_dict(rows)
        if described:
            table = table.cast_column("img", datasets.Image()).cast_column(
                "label", datasets.ClassLabel(names=["cat", "dog"])
            )
        (tmp_path / "set").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    found = images.read(tmp_path / "set", cache=tmp_path / "cache")
    assert found.classes == (("cat", "dog") if described else ("0000", "0001"))
    plain = images.read(folder(tmp_path / "plain", content), cache=tmp_path / "cache")
    np.testing.assert_array_equal(found.train.pixels, plain.train.pixels)
    np.testing.assert_array_equal(found.train.labels, plain.train.labels)


def test_without_the_package_datasets_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ssmlens\[data\]'"):
        images.read("datasets:uoft-cs/cifar10", cache=tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b/c", "", "a b"])
def test_names_that_are_none_of_the_hub(tmp_path, name):
    with pytest.raises(UserError, match="is no data set of the hub"):
        images.read(f"datasets:{name}", cache=tmp_path)


def test_a_package_that_would_run_code_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("datasets"), "__version__", "3.6.0")
    with pytest.raises(UserError, match="can run code"):
        images.read("datasets:uoft-cs/cifar10", cache=tmp_path)


def test_without_zstandard_it_is_named(tmp_path, monkeypatch):
    source = tar(tmp_path / "set.tar.zst", files())
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(UserError, match="zstandard"):
        images.read(source, cache=tmp_path)


def test_digits():
    found = images.digits()
    assert (found.height, found.width, found.channels, len(found.classes)) == (8, 8, 1, 10)
    assert (len(found.train), len(found.test)) == (1438, 359)
    assert found.train.pixels.max() == 255
    assert images.read("digits").sha256 == found.sha256


# ---------------------------------------------------------------------------------------------------- broken


def cut(content: dict[str, bytes], name: str, keep: int) -> dict[str, bytes]:
    return content | {name: content[name][:keep]}


class Evil:
    def __reduce__(self):
        return (print, ("this must never be printed",))


BROKEN = {
    "a batch is missing": (lambda: {k: v for k, v in binary().items() if "3" not in k}, "no data_batch_3.bin"),
    "half an image": (lambda: cut(binary(), "data_batch_2.bin", 3073 * 3 + 1), "data_batch_2.bin has 9,220 bytes"),
    "images are missing": (lambda: cut(binary(), "data_batch_2.bin", 3073 * 3), "data_batch_2.bin holds 3 images"),
    "a label beyond 9": (lambda: binary() | {"test_batch.bin": b"\x0b" * 3073 * N}, "the label 11"),
    "a class is missing": (
        lambda: binary() | {"test_batch.bin": b"\1" * 3073 * N}, "test has no image of the class airplane, bird",
    ),
    "a pickle is cut": (lambda: cut(python(), "data_batch_4", 5000), "data_batch_4 is damaged"),
    "a pickle of code": (lambda: python() | {"data_batch_1": pickle.dumps(Evil())}, "data_batch_1: it asks for builtins.print"),
    "code among the data": (
        lambda: python() | {"data_batch_1": pickle.dumps({"data": Evil()})}, "data_batch_1: it asks for builtins.print",
    ),
    "an array of objects": (
        lambda: python() | {"data_batch_1": pickle.dumps({"data": np.array([[None]]), "labels": [1]})}, "something else than bytes",
    ),
    "no dict": (lambda: python() | {"test_batch": pickle.dumps([1, 2])}, "test_batch holds no batch"),
    "labels that are text": (
        lambda: python() | {"test_batch": pickle.dumps({"data": BATCHES["test_batch"][0], "labels": ["x"] * N})}, "labels that are no numbers",
    ),
    "a cut image": (lambda: cut(files(), "train/dog/0001.png", 60), "train/dog/0001.png: not a whole PNG"),
    "no image": (lambda: files() | {"train/dog/0001.png": b"hello"}, "train/dog/0001.png: not a whole PNG"),
    "another size": (
        lambda: files() | {"test/cat/0000.png": picture(np.zeros((5, 4, 3), np.uint8))}, "test/cat/0000.png has 4 × 5 pixels",
    ),
    "a huge image": (lambda: files() | {"test/cat/0000.png": picture(np.zeros((1, 5000, 3), np.uint8))}, "5000 × 1 pixels; at most"),
    "transparent": (lambda: files() | {"test/cat/0000.png": picture(np.zeros((4, 4, 4), np.uint8))}, "mode RGBA"),
    "no test images": (lambda: {k: v for k, v in files().items() if "train" in k}, "holds no images test/CLASS"),
    "a class in train alone": (lambda: files() | {"train/emu/1.png": files()["train/cat/0000.png"]}, "test has no image of the class emu"),
    "an image elsewhere": (lambda: files() | {"cover.png": files()["train/cat/0000.png"]}, "cover.png does not lie in train/CLASS"),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["directory", "archive"])
@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named(tmp_path, what, packed, capsys):
    make, message = BROKEN[what]
    content = make()
    source = tar(tmp_path / "set.tar.gz", content) if packed else folder(tmp_path / "set", content)
    with pytest.raises(UserError) as e:
        images.read(source, cache=tmp_path / "cache")
    assert message in str(e.value)
    assert source.name in str(e.value)
    assert "never" not in capsys.readouterr().out
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_a_directory_of_a_class_without_images_is_named(tmp_path):
    source = folder(tmp_path / "set", files())
    (source / "train" / "emu").mkdir()
    with pytest.raises(UserError, match="train has no image of the class emu"):
        images.read(source, cache=tmp_path / "cache")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.zst"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.999])
def test_a_cut_archive_is_never_taken_for_a_small_one(tmp_path, suffix, share):
    source = tar(tmp_path / f"set.{suffix}", files(per_class=6))
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * share)])
    if suffix == "tar" and share > 0.9:  # only padding is gone
        assert len(images.read(source, cache=tmp_path / "cache").train) == 12
        return
    with pytest.raises(UserError, match=r"cut|damaged|cannot read|end"):
        images.read(source, cache=tmp_path / "cache")


def test_a_tar_cut_between_two_members(tmp_path):
    """Readers that stop at the end of the data would see a smaller, whole data set."""
    content = files(per_class=3)
    source = tar(tmp_path / "set.tar", dict(sorted(content.items(), key=lambda item: item[0][-8:])))
    data = source.read_bytes()
    with tarfile.open(source) as t:
        borders = [member.offset for member in t]
    source.write_bytes(data[: borders[-2]])
    with pytest.raises(UserError, match="end of a tar archive is missing"):
        images.read(source, cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["../train/cat/0.png", "/train/cat/0.png", "a/../../train/cat/0.png"])
def test_names_that_lead_outside_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="names a file outside"):
        images.read(tar(tmp_path / "set.tar", files() | {name: b"x"}), cache=tmp_path / "cache")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as out:
        info = tarfile.TarInfo("train/cat/0000.png")
        info.type, info.linkname = kind, "/etc/passwd"
        out.addfile(info)
    with pytest.raises(UserError, match="a link, a device or sparse"):
        images.read(path, cache=tmp_path / "cache")


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_LARGEST", 1 << 20)
    path = tmp_path / "set.tar.gz"
    path.write_bytes(gzip.compress(bytes(1 << 22)))
    with pytest.raises(UserError, match="holds more than"):
        images.read(path, cache=tmp_path / "cache")


@given(st.binary(max_size=300), st.sampled_from(["set.tar", "set.tar.gz", "set.tar.zst"]))
@settings(max_examples=60, deadline=None)
def test_whatever_the_bytes_are_the_error_is_the_users(tmp_path_factory, data, name):
    path = tmp_path_factory.mktemp("x") / name
    path.write_bytes(data)
    with pytest.raises(UserError):
        images.read(path, cache=path.parent / "cache")


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_bytes_make_the_pickle_reader_run_or_crash(data):
    with pytest.raises(UserError):
        cifar._pickled(b"\x80\x02" + data, "batch")


@pytest.mark.parametrize("source", ["nonesuch", "nonesuch.tar", "datasets-typo/x"])
def test_a_missing_source_says_what_there_could_be(tmp_path, source):
    with pytest.raises(UserError, match="no images at"):
        images.read(tmp_path / source, cache=tmp_path)


def test_other_directories_and_files(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images that are known"):
        images.read(tmp_path / "empty", cache=tmp_path / "cache")
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="no archive of images"):
        images.read(tmp_path / "set.zip", cache=tmp_path / "cache")


# ----------------------------------------------------------------------------------------------------- cache


def test_what_is_decoded_is_kept_and_mapped(tmp_path, monkeypatch):
    source = tar(tmp_path / "set.tar", files())
    first = images.read(source, cache=tmp_path / "cache")
    assert isinstance(first.train.pixels, np.memmap)
    assert not first.train.pixels.flags.writeable
    monkeypatch.setattr(archive, "members", None)  # decoding again would fail
    again = images.read(source, cache=tmp_path / "cache")
    assert again.sha256 == first.sha256
    assert again.classes == first.classes
    np.testing.assert_array_equal(again.test.pixels, first.test.pixels)


def test_another_content_is_another_entry(tmp_path):
    source = folder(tmp_path / "set", files())
    first = images.read(source, cache=tmp_path / "cache")
    (source / "test/cat/0000.png").write_bytes(picture(np.zeros((4, 4, 3), np.uint8)))
    second = images.read(source, cache=tmp_path / "cache")
    assert (second.test.pixels[0] == 0).all()
    assert first.sha256 != second.sha256


@pytest.mark.parametrize("harm", ["cut", "longer", "empty", "noise", "header"])
def test_a_damaged_entry_is_made_again(tmp_path, harm):
    source = tar(tmp_path / "set.tar", files())
    sha256 = images.read(source, cache=tmp_path / "cache").sha256
    (entry,) = (tmp_path / "cache").glob("*.images")
    data = entry.read_bytes()
    changed = {
        "cut": data[:-1],
        "longer": data + b"x",
        "empty": b"",
        "noise": b"\xff" * 500,
        "header": data[:8] + b"{" + data[9:40],
    }
    entry.write_bytes(changed[harm])
    assert store.read(entry) is None
    assert images.read(source, cache=tmp_path / "cache").sha256 == sha256


WRITER = """
import sys
from ssmlens.tasks import images
from ssmlens.tasks.images import store
print("ready", flush=True)
while True:
    store.write(store.Path(sys.argv[1]), images.digits())
"""


def test_killed_writers_and_readers_at_once(tmp_path):
    """Several processes replace one entry all the time and are killed: whoever reads sees a whole one."""
    entry = tmp_path / "x.images"
    store.write(entry, images.digits())
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(entry)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        sha256 = images.digits().sha256
        end = time.monotonic() + 1.5
        seen = 0
        while time.monotonic() < end:
            found = store.read(entry)
            assert found is not None
            assert found.sha256 == sha256
            assert images.base.digest(found.classes, (8, 8, 1), (found.train, found.test)) == sha256
            seen += 1
        assert seen > 3
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    assert store.read(entry).sha256 == sha256
    store.write(entry, images.digits())  # tidies what the dead left
    assert [p.name for p in tmp_path.iterdir()] == ["x.images"]


# ---------------------------------------------------------------------------------------------------- stream


def test_batches_are_random_access_and_an_epoch_sees_every_image_once():
    config = ImageConfig(source="digits", batch_size=100, seed=3)
    stream, other = ImageStream(config), ImageStream(config)
    assert stream.batches_per_epoch == 14
    batches = [stream.batch(i) for i in range(28)]
    for step in (27, 3, 14, 0):
        again = other.batch(step)
        assert torch.equal(again.tokens, batches[step].tokens)
        assert torch.equal(again.targets, batches[step].targets)
    for epoch in (batches[:14], batches[14:]):
        rows = torch.cat([b.tokens for b in epoch]).flatten(1)
        assert rows.shape == (1400, 64)
        assert len(torch.unique(rows, dim=0)) > 1350  # a few digits are alike
    assert not torch.equal(batches[0].targets, batches[14].targets)
    assert not torch.equal(ImageStream(config.model_copy(update={"seed": 4})).batch(0).targets, batches[0].targets)


def test_pixels_are_what_they_were():
    stream = ImageStream(ImageConfig(source="digits", batch_size=7))
    batch = stream.batch(0)
    assert batch.tokens.dtype == torch.float32
    assert batch.tokens.shape == (7, 64, 1)
    assert 0 <= batch.tokens.min() <= batch.tokens.max() <= 1
    pixels = (batch.tokens * 255).round().to(torch.uint8).numpy()
    for row, label in zip(pixels, batch.targets, strict=True):
        found = (stream.images.train.pixels == row).all((1, 2))
        assert label in stream.images.train.labels[found]


def test_subsets_are_balanced_and_apart():
    stream = ImageStream(ImageConfig(source="digits", train_images=200, validation_images=100, batch_size=20))
    assert stream.batches_per_epoch == 10
    labels = torch.cat([stream.batch(i).targets for i in range(10)])
    assert labels.bincount().tolist() == [20] * 10
    kept = torch.cat([b.targets for b in stream.validation()])
    assert len(kept) == 100
    assert kept.bincount().max() <= 20
    assert not set(stream._train) & set(stream._validation)
    assert [len(b.targets) for b in stream.test(45)] == [20, 20, 5]
    whole = ImageStream(ImageConfig(source="digits"))
    assert sum(len(b.targets) for b in whole.validation()) == 359  # the test images


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 60))
def test_a_balanced_order_takes_the_same_of_every_class_while_there_are_any(labels, first):
    labels = np.array(labels, np.int64)
    order = images.balanced_order(labels)
    assert sorted(order) == list(range(len(labels)))
    taken = np.bincount(labels[order[:first]], minlength=5)
    there = np.bincount(labels, minlength=5)
    full = taken.max()
    assert (taken >= np.minimum(there, full - 1)).all()


def test_scaled_by_cifars_own_mean(tmp_path):
    source = str(folder(tmp_path / "c", binary()))
    plain, scaled = (
        ImageStream(
            ImageConfig(source=source, batch_size=8, scale=scale), images.read(source, cache=tmp_path / "cache")
        ).batch(0)
        for scale in ("unit", "cifar10")
    )
    mean, std = torch.tensor(images.CIFAR10_MEAN), torch.tensor(images.CIFAR10_STD)
    torch.testing.assert_close(scaled.tokens, (plain.tokens - mean) / std)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_images": 1400, "validation_images": 100}, "are more"),
        ({"batch_size": 2000}, "are more"),
        ({"train_images": 10, "batch_size": 20}, "less than a batch"),
        ({"scale": "cifar10"}, "3 channels"),
        ({"sauce": "digits"}, "no key 'sauce'; did you mean 'source'"),
    ],
)
def test_wrong_configs_are_named(given, message):
    with pytest.raises(UserError, match=message):
        stream_of({"task": "images", "source": "digits", **given})


def test_a_stream_by_its_task():
    stream = stream_of({"task": "images", "source": "digits"})
    assert isinstance(stream, ImageStream)
    assert (stream.n_classes, stream.d_input, stream.length) == (10, 1, 64)
    assert stream.identity == {"sha256": images.digits().sha256}
    with pytest.raises(UserError, match="steps count from 0"):
        stream.batch(-1)
