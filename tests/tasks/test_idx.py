"""MNIST's files, as small ones written here: plain and compressed, and every way in which they can be wrong."""

from __future__ import annotations

import gzip
import struct

import pytest
import torch

from grok_callbacks.tasks import MNISTDataModule, load_mnist, read_idx

GENERATOR = torch.Generator().manual_seed(0)
PARTS = {
    "train": (torch.randint(256, (12, 5, 4), generator=GENERATOR), torch.arange(12) % 10),
    "t10k": (torch.randint(256, (7, 5, 4), generator=GENERATOR), torch.arange(7)),
}


def idx(values, kind=0x08):
    """The bytes of an IDX file, put together by hand."""
    header = bytes([0, 0, kind, values.ndim]) + b"".join(struct.pack(">I", size) for size in values.shape)
    return header + bytes(values.flatten().tolist())


def write(folder, compress=False):
    for part, (images, labels) in PARTS.items():
        for name, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
            else:
                (folder / name).write_bytes(idx(values))
    return folder


@pytest.mark.parametrize("compress", [False, True])
class TestWhole:
    def test_load(self, tmp_path, compress):
        (images, labels), (test_images, test_labels) = load_mnist(write(tmp_path, compress))
        assert images.dtype == test_images.dtype == torch.float32
        assert torch.equal(images, PARTS["train"][0][:, None].float() / 255)
        assert torch.equal(test_images, PARTS["t10k"][0][:, None].float() / 255)
        assert (labels.tolist(), test_labels.tolist()) == (PARTS["train"][1].tolist(), PARTS["t10k"][1].tolist())

    def test_data_module(self, tmp_path, compress):
        folder = write(tmp_path, compress)
        data = MNISTDataModule(folder, train_size=5, seed=3)
        inputs, targets = next(iter(data.train_dataloader()))
        assert (inputs.shape, targets.shape, targets.dtype) == ((5, 1, 5, 4), (5, 10), torch.float32)
        (images, labels), (test_images, _) = load_mnist(folder)
        for image, target in zip(inputs, targets, strict=True):
            (place,) = (images == image).flatten(1).all(1).nonzero()
            assert labels[place].item() == target.argmax().item()
        assert torch.equal(next(iter(data.val_dataloader()))[0], test_images)
        assert torch.equal(MNISTDataModule(folder, 5, seed=3).train_set.inputs, data.train_set.inputs)
        assert not torch.equal(MNISTDataModule(folder, 5, seed=4).train_set.inputs, data.train_set.inputs)
        assert MNISTDataModule(folder, 12, one_hot=False).train_set.targets.dtype == torch.int64


def test_compression_is_told_from_the_content(tmp_path):
    (tmp_path / "a").write_bytes(gzip.compress(idx(PARTS["train"][0])))
    (tmp_path / "b.gz").write_bytes(idx(PARTS["train"][0]))
    for name in ("a", "b.gz"):
        values = read_idx(tmp_path / name)
        assert values.dtype == torch.uint8
        assert torch.equal(values, PARTS["train"][0].byte())


def test_no_elements(tmp_path):
    (tmp_path / "a").write_bytes(idx(torch.zeros(0, 28, 28)))
    assert read_idx(tmp_path / "a").shape == (0, 28, 28)


GOOD = idx(PARTS["train"][0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file: it begins with nothing"),
        (b"\0\0", "is not an IDX file"),
        (b"<html>Not found</html>", "is not an IDX file: it begins with 3c 68 74 6d"),
        (idx(PARTS["t10k"][1], kind=0x0D), "of the IDX type 0x0d"),
        (GOOD[:6], "truncated: 6 bytes, of which the header alone takes 16"),
        (GOOD[:-1], r"truncated: 255 bytes instead of 256 for the shape \(12, 5, 4\)"),
        (GOOD + b"\0", "too long: 257 bytes instead of 256"),
        (gzip.compress(GOOD)[:-20], "can't be uncompressed"),
        (gzip.compress(GOOD)[:12] + b"garbage", "can't be uncompressed"),
        (gzip.compress(b"hello"), "is not an IDX file"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    write(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_mnist(tmp_path)
    assert str(path) in str(error.value)


class TestWrongSets:
    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
            load_mnist(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="no folder"):
            load_mnist(write(tmp_path) / "t10k-images-idx3-ubyte")

    def test_missing_file(self, tmp_path):
        (write(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(FileNotFoundError, match=r"neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz in"):
            load_mnist(tmp_path)

    @pytest.mark.parametrize(
        ("name", "values", "message"),
        [
            ("train-labels-idx1-ubyte", PARTS["train"][0], r"has the shape \(12, 5, 4\), not 1 dimension"),
            ("train-labels-idx1-ubyte", PARTS["t10k"][1], "12 images and 7 labels for train"),
            ("t10k-labels-idx1-ubyte", torch.arange(7) + 4, "labels for t10k in .* go up to 10"),
            ("t10k-images-idx3-ubyte", PARTS["t10k"][0][:, :4], r"differ in size: \(5, 4\) and \(4, 4\)"),
        ],
    )
    def test_files_that_do_not_go_together(self, tmp_path, name, values, message):
        (write(tmp_path) / name).write_bytes(idx(values))
        with pytest.raises(ValueError, match=message):
            load_mnist(tmp_path)

    def test_empty_set(self, tmp_path):
        for name, shape in (("images-idx3", (0, 5, 4)), ("labels-idx1", (0,))):
            (write(tmp_path) / f"train-{name}-ubyte").write_bytes(idx(torch.zeros(shape)))
        with pytest.raises(ValueError, match=r"0 images|12 images and 0 labels"):
            load_mnist(tmp_path)

    @pytest.mark.parametrize("size", [0, 13])
    def test_train_size(self, tmp_path, size):
        with pytest.raises(ValueError, match=f"`train_size` must be from 1 to 12, got {size}"):
            MNISTDataModule(write(tmp_path), train_size=size)
