"""Files that somebody made to do harm: they run code, lead out of their folder, or unfold into more than there is."""

import dataclasses
import gzip
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.fuzz.loaders import original_weights

HUGE = 10**12


@dataclasses.dataclass(frozen=True)
class Hostile:
    """`write(folder, path, outside, mark)` replaces the valid file at `path` in `folder`.

    `outside` is a folder that must not be read, `mark` a folder that code in the file would make.
    """

    name: str
    write: Callable[[Path, Path, Path, Path], Any]


class _Code:
    """What makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def nested(value: Any, depth: int = 30) -> Any:
    """Return lists of 2 ** depth values that take the memory of a few: each holds the next one twice."""
    for _ in range(depth):
        value = [value, value]
    return value


def _edited(**changes: Any) -> Callable[[Path, Path, Path, Path], Any]:
    def write(_folder: Path, path: Path, _outside: Path, _mark: Path) -> None:
        torch.save({**torch.load(path, weights_only=True), **changes}, path)

    return write


def _original(**changes: Any) -> Callable[[Path, Path, Path, Path], Any]:
    def write(_folder: Path, path: Path, _outside: Path, _mark: Path) -> None:
        torch.save({"teacher": original_weights() | {k.replace("__", "."): v for k, v in changes.items()}}, path)

    return write


def _written(content: bytes) -> Callable[[Path, Path, Path, Path], Any]:
    return lambda _folder, path, _outside, _mark: path.write_bytes(content)


def _zip_bomb(_folder: Path, path: Path, _outside: Path, _mark: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x/data.pkl", "w") as part:
        for _ in range(100):
            part.write(bytes(10_000_000))


def _zip_with_paths(_folder: Path, path: Path, outside: Path, _mark: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"../{outside.name}/left", "x")


def _pickled(make: Callable[[dict[str, Any], Path, Path], Any]) -> Callable[[Path, Path, Path, Path], Any]:
    def write(_folder: Path, path: Path, outside: Path, mark: Path) -> None:
        content = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(make(content, outside, mark), protocol=2))

    return write


def _way_out(content: dict[str, Any], outside: Path, _mark: Path) -> dict[str, Any]:
    Image.new("RGB", (4, 4)).save(_made(outside) / "all_souls_000000.jpg")  # a file of that name is inside, too
    return content | {"imlist": [f"../../../{outside.name}/all_souls_000000", *content["imlist"][1:]]}


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _png(width: int, height: int, *, text: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    more = chunk(b"zTXt", b"comment\0\0" + zlib.compress(text)) if text else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + more
        + chunk(b"IDAT", zlib.compress(bytes(999)))
        + chunk(b"IEND", b"")
    )


def _gif(width: int, height: int) -> bytes:
    Image.new("P", (8, 8)).save(file := io.BytesIO(), "GIF")
    content = bytearray(file.getvalue())
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def _postscript(_folder: Path, path: Path, _outside: Path, mark: Path) -> None:
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(" + bytes(mark) + b") run\n%%EOF\n"
    )


def _many_names(count: int) -> bytes:
    return "".join(f"name_{number}.png\n" for number in range(count)).encode()


def _config(**changes: Any) -> Callable[[Path, Path, Path, Path], Any]:
    import json

    def write(folder: Path, _path: Path, _outside: Path, mark: Path) -> None:
        path = folder / "backbone" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        (folder / "backbone" / "code.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Config: pass\n")

    return write


def _pickle_for_weights(folder: Path, _path: Path, _outside: Path, mark: Path) -> None:
    (folder / "backbone" / "model.safetensors").unlink()
    torch.save({"weight": _Code(mark)}, folder / "backbone" / "pytorch_model.bin")


def _way_out_of_checksums(folder: Path, _path: Path, outside: Path, _mark: Path) -> None:
    (_made(outside) / "secret").write_text("secret")
    (folder / "backbone" / "SHA256SUMS").write_text(f"{'0' * 64}  ../../{outside.name}/secret\n")


def _parquet(*items: Any, label: Any = 0) -> Callable[[Path, Path, Path, Path], Any]:
    def write(_folder: Path, path: Path, outside: Path, _mark: Path) -> None:
        import datasets
        import pyarrow
        import pyarrow.parquet

        Image.new("RGB", (4, 4)).save(_made(outside) / "secret.png")
        filled = [
            {**item, "path": item["path"].format(outside=outside)} if item and item["path"] else item for item in items
        ]
        kinds = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["even", "odd"])}
        rows = {"picture": filled, "kind": [label] * len(filled)}
        # By pyarrow, because `datasets` reads such files and puts them in.
        pyarrow.parquet.write_table(pyarrow.Table.from_pydict(rows, datasets.Features(kinds).arrow_schema), path)

    return write


def _script(folder: Path, _path: Path, _outside: Path, mark: Path) -> None:
    (folder / "set" / "set.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")


_SETS = (
    Hostile("script that loads the set", _script),
    Hostile("path of a file outside", _parquet({"bytes": None, "path": "{outside}/secret.png"})),
    Hostile("path that goes up", _parquet({"bytes": None, "path": "set/../outside/secret.png"})),
    Hostile("address in place of a path", _parquet({"bytes": None, "path": "http://127.0.0.1:9/x.png"})),
    Hostile("image without bytes and path", _parquet({"bytes": None, "path": None})),
    Hostile("no image in a row", _parquet(None)),
    Hostile("no label in a row", _parquet({"bytes": _png(8, 8), "path": "a.png"}, label=None)),
    Hostile("bomb of an image", _parquet({"bytes": _png(60_000, 60_000), "path": "a.png"})),
)

HOSTILE: dict[str, tuple[Hostile, ...]] = {
    "checkpoint.pt": (
        Hostile(
            "code", lambda folder, path, outside, mark: _edited(optimizer=_Code(mark))(folder, path, outside, mark)
        ),
        Hostile("code in a plain pickle", lambda _f, path, _o, mark: path.write_bytes(pickle.dumps(_Code(mark)))),
        Hostile("zip bomb", _zip_bomb),
        Hostile("paths in a zip file", _zip_with_paths),
        Hostile("tensor larger than its storage", _edited(method={"weight": torch.zeros(1).expand(HUGE)})),
        Hostile("step that is text", _edited(step="seven")),
        Hostile("step that is negative", _edited(step=-1)),
        Hostile("step that is a tensor", _edited(step=torch.ones(3))),
        Hostile("recipe that is a list", _edited(recipe=[1])),
        Hostile("recipe with keys of other types", _edited(recipe={1: 2, "name": 3})),
    ),
    "original .pth": (
        Hostile("code", lambda _f, path, _o, mark: torch.save({"teacher": original_weights(), "x": _Code(mark)}, path)),
        Hostile("zip bomb", _zip_bomb),
        Hostile("tensor larger than its storage", _original(pos_embed=torch.zeros(1, 1, 1).expand(1, HUGE, 8))),
        Hostile("network too wide", _original(patch_embed__proj__weight=torch.zeros(1).expand(10**6, 3, 8, 8))),
        Hostile("patches of another rank", _original(patch_embed__proj__weight=torch.zeros(8, 8))),
        Hostile("positions of another rank", _original(pos_embed=torch.zeros(8))),
        Hostile("no positions", _original(pos_embed=torch.zeros(1, 0, 8))),
        Hostile("block without a number", _original(blocks__x__norm1__weight=torch.zeros(8))),
        Hostile("block of a huge number", _original(blocks__99999999__norm1__weight=torch.zeros(8))),
        Hostile("weights of an odd dtype", _original(norm__weight=torch.zeros(8, dtype=torch.complex64))),
        Hostile("sparse weights", _original(norm__weight=torch.zeros(8).to_sparse())),
        Hostile("numbers for names", lambda _f, path, _o, _m: torch.save({1: torch.zeros(1), 2: torch.zeros(1)}, path)),
    ),
    "original .pth of torch before 1.6": (
        Hostile(
            "code",
            lambda _f, path, _o, mark: torch.save({"x": _Code(mark)}, path, _use_new_zipfile_serialization=False),
        ),
    ),
    "backbone/": (Hostile("checksums of a file outside", _way_out_of_checksums),),
    "folder of AutoModel without checksums": (
        Hostile("code of its own", _config(auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Config"})),
        Hostile("unknown model with code of its own", _config(model_type="x", auto_map={"AutoConfig": "code.Config"})),
        Hostile("pickle for weights", _pickle_for_weights),
        Hostile("network too wide", _config(hidden_size=2 * 10**7)),
        Hostile("network too deep", _config(num_hidden_layers=10**9)),
        Hostile("another model", _config(model_type="bert")),
    ),
    "images": (
        Hostile("3.6 billion pixels in a PNG", _written(_png(60_000, 60_000))),
        Hostile("4 billion pixels in a GIF", _written(_gif(65_535, 65_535))),
        Hostile("text that unfolds to a gigabyte", _written(_png(8, 8, text=bytes(10**9)))),
        Hostile("program for Ghostscript", _postscript),
    ),
    "parquet": _SETS,
    "parquet as a stream": _SETS,
    "retrieval ground truth": (
        Hostile("code", _pickled(lambda content, _, mark: content | {"x": _Code(mark)})),
        Hostile("path that goes up", _pickled(_way_out)),
        Hostile(
            "path from the root", _pickled(lambda content, outside, _: content | {"qimlist": [str(outside / "secret")]})
        ),
        Hostile("lists in lists for a name", _pickled(lambda content, *_: content | {"imlist": [nested(1)]})),
        Hostile(
            "lists in lists for a box",
            _pickled(lambda content, *_: content | {"gnd": [content["gnd"][0] | {"bbx": nested(1.0)}]}),
        ),
        Hostile(
            "lists in lists for numbers",
            _pickled(lambda content, *_: content | {"gnd": [content["gnd"][0] | {"easy": nested(1)}]}),
        ),
        Hostile("names with a zero byte", _pickled(lambda content, *_: content | {"qimlist": ["a\0b"]})),
    ),
    "list of a split": (
        Hostile("path that goes up", _written(b"../../../outside/secret.png\n")),
        Hostile("path from the root", _written(b"/etc/passwd\n")),
        Hostile("many names", _written(_many_names(500_000))),
    ),
    "list of DAVIS": (
        Hostile("path that goes up", _written(b"../../../outside\n")),
        Hostile("path from the root", _written(b"/etc\n")),
        Hostile("name with a zero byte", _written(b"be\0ar\n")),
        Hostile("long name", _written(b"x" * 100_000)),
        Hostile("pattern", _written(b"**\n")),
        Hostile("no UTF-8", _written(b"\xff\xfe\n")),
    ),
    "recipe": (
        Hostile("code", _written(b"name: !!python/object/apply:os.mkdir [executed]\n")),
        Hostile(
            "lists in lists",
            _written(
                b"a0: &a0 [1]\n"
                + b"".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n".encode() for n in range(1, 25))
                + b"lr: *a24\n"
            ),
        ),
        Hostile(
            "mappings merged into mappings",
            _written(
                b"a0: &a0 {x: 1}\n"
                + b"".join(
                    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]}}\n".encode() for n in range(1, 25)
                )
            ),
        ),
        Hostile("list that holds itself", _written(b"name: &a [*a]\n")),
        Hostile("brackets in brackets", _written(b"lr: " + b"[" * 100_000)),
        Hostile("number of many digits", _written(b"seed: " + b"9" * 100_000 + b"\n")),
        Hostile("number of base 60", _written(b"seed: " + b"1:" * 50_000 + b"1\n")),
    ),
    "results.jsonl": (
        Hostile("brackets in brackets", _written(b'{"value": 1}\n' + b"[" * 200_000 + b"\n")),
        Hostile("number of many digits", _written(b'{"value": ' + b"9" * 100_000 + b"}\n")),
        Hostile("binary", _written(bytes(range(256)) * 99)),
    ),
    "images.txt.gz": (
        Hostile("gigabytes of zeros", _written(gzip.compress(bytes(10**7)) * 600)),
        Hostile("path that goes up", _written(gzip.compress(b"../../outside/secret.png\t9\n"))),
    ),
}
