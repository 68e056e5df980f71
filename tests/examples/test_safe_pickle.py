"""What is read from a pickle, and that nothing in a hostile one is called."""

import codecs
import os
import pickle
import re

import numpy as np
import pytest

from evaluators.retrieval.safe_pickle import load_plain_pickle

CONTENT = {
    "imlist": ["all_souls_000013", "é"],
    "gnd": [{"bbx": [136.5, 34.1, 648.5, 955.7], "easy": np.array([3, 1]), "junk": np.array([]), "one": np.float64(2)}],
}
# What Python 2 wrote for {"a": np.array([3, 1])}.
PYTHON_2 = (
    b"\x80\x02}q\x00U\x01aq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85q\x04U\x01b"
    b"\x87Rq\x05(K\x01K\x02\x85cnumpy\ndtype\nq\x06U\x02i8K\x00K\x01\x87Rq\x07(K\x03U\x01<NNNJ\xff\xff\xff\xff"
    b"J\xff\xff\xff\xffK\x00tb\x89U\x10\x03" + 7 * b"\x00" + b"\x01" + 7 * b"\x00" + b"tbs."
)


def check(loaded):
    assert loaded["imlist"] == CONTENT["imlist"]
    got, want = loaded["gnd"][0], CONTENT["gnd"][0]
    assert got["bbx"] == want["bbx"]
    assert got["one"] == 2
    for key in ("easy", "junk"):
        assert got[key].dtype == want[key].dtype
        assert got[key].tolist() == want[key].tolist()


@pytest.mark.parametrize("protocol", range(6))
def test_containers_and_arrays_are_read(tmp_path, protocol):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(CONTENT, protocol))
    check(load_plain_pickle(path))


@pytest.mark.parametrize("protocol", range(4))
def test_pickles_of_numpy_1_and_2_are_read(tmp_path, protocol):
    """They differ in the names of numpy's modules, which lie in plain text in these protocols."""
    path = tmp_path / "gnd.pkl"
    written = pickle.dumps(CONTENT, protocol)
    for old, new in ((b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")):
        path.write_bytes(written.replace(old, new))
        assert new in path.read_bytes()
        check(load_plain_pickle(path))


def test_a_pickle_of_python_2_is_read(tmp_path):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(PYTHON_2)
    assert load_plain_pickle(path)["a"].tolist() == [3, 1]


class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open({!r}, 'w')",), "eval"),
        (np.fromfile, ("{}",), "fromfile"),
        (getattr, ("", "format"), "getattr"),
        (pickle.loads, ("",), "loads"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nothing_else_is_called(tmp_path, function, arguments, name, protocol):
    mark, path = tmp_path / "mark", tmp_path / "gnd.pkl"
    arguments = [argument.format(str(mark)) for argument in arguments]
    path.write_bytes(pickle.dumps({"gnd": [Call(function, *arguments)]}, protocol))
    with pytest.raises(ValueError, match=rf"cannot read the pickle '{re.escape(str(path))}': it asks for \S*{name}"):
        load_plain_pickle(path)
    assert not mark.exists()


class Rebuilt(Call):
    """A call whose result then gets a state."""

    def __init__(self, function, *arguments, state):
        self.reduced = function, arguments, state


def array(dtype, data, shape=(1,)):
    return Rebuilt(np.empty(0).__reduce__()[0], np.ndarray, (0,), b"b", state=(1, shape, dtype, False, data))


ADDRESS = id(os).to_bytes(8, "little")
CLEARED = Rebuilt(np.dtype, "V8", False, True, state=(3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0))
NUMBERS = array(np.dtype("i8"), ADDRESS)


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (Call(np.ndarray, (1,), np.dtype("O"), ADDRESS), "dtype 'O8'"),
        (Call(np.ndarray, (1,), np.dtype("i8"), ADDRESS), "not callable"),
        (array(np.dtype("O"), ADDRESS), "dtype 'O8'"),
        (array(CLEARED, ADDRESS), "dtype 'V8'"),  # the flags say that it holds no objects
        (array(np.dtype("i8"), NUMBERS), "not made of bytes"),  # its memory would go with those numbers'
        (array(np.dtype("i8"), ADDRESS, (-1, -1)), "unknown dimension"),
        (array(np.dtype("i8"), ADDRESS, (2**40,)), "cannot reshape"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_bytes_do_not_become_objects(tmp_path, hostile, reason, protocol):
    """numpy's own unpickling takes them for the addresses of objects, or for more memory than there is."""
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(hostile, protocol))
    with pytest.raises(ValueError, match=f"cannot read the pickle .*{reason}"):
        load_plain_pickle(path)


def test_bytes_are_not_made_by_any_codec_or_of_any_length(tmp_path):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(Call(codecs.encode, "text", "rot13"), 2))
    with pytest.raises(ValueError, match="it asks for the codec 'rot13'"):
        load_plain_pickle(path)
    path.write_bytes(pickle.dumps(Call(bytes, 2**60), 2))
    with pytest.raises(ValueError, match=r"_empty_bytes\(\) takes 0 positional arguments"):
        load_plain_pickle(path)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_truncated_pickle_is_named(tmp_path, protocol):
    path = tmp_path / "gnd.pkl"
    written = pickle.dumps(CONTENT, protocol)
    for length in (0, 1, len(written) // 2, len(written) - 1):
        path.write_bytes(written[:length])
        with pytest.raises(ValueError, match="cannot read the pickle"):
            load_plain_pickle(path)
