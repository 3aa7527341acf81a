"""FER2013's CSV file."""

import numpy as np
import pytest

from fastcnn import data
from fastcnn.data import FormatError, MissingDataError

RNG = np.random.default_rng(3)
FACES = RNG.integers(0, 256, (6, 48, 48), np.uint8)
EMOTIONS = [0, 6, 3, 3, 1, 5]
USAGE = ["Training", "Training", "Training", "PublicTest", "PrivateTest", "PrivateTest"]


def rows():
    return [
        f"{emotion},{' '.join(map(str, face.ravel()))},{usage}"
        for emotion, face, usage in zip(EMOTIONS, FACES, USAGE, strict=True)
    ]


def write(path, lines, header="emotion,pixels,Usage", newline="\n"):
    path.write_bytes((newline.join([header, *lines]) + newline).encode())
    return path


def test_parts(tmp_path):
    path = write(tmp_path / "fer2013.csv", rows())
    for split, wanted in (("train", [0, 1, 2]), ("test", [4, 5]), ("all", range(6))):
        faces = data.load(path, split)
        np.testing.assert_array_equal(faces.images[..., 0], FACES[list(wanted)])
        np.testing.assert_array_equal(faces.labels, np.array(EMOTIONS)[list(wanted)])
    assert faces.classes[3] == "happy"
    assert faces.input_shape == (1, 48, 48)
    np.testing.assert_array_equal(data.read_fer2013(path, "validation").images[..., 0], FACES[[3]])


def test_kaggles_second_file_and_windows_lines(tmp_path):
    lines = [f"{e},{u},{p}" for e, p, u in (row.split(",") for row in rows())]
    path = write(tmp_path / "icml_face_data.csv", lines, "\ufeffemotion, Usage, pixels", "\r\n")
    np.testing.assert_array_equal(data.load(path, "train").images[..., 0], FACES[:3])


def test_named_set_is_found(tmp_path):
    write(tmp_path / "fer2013.csv", rows())
    assert len(data.load("fer2013", "train", root=tmp_path)) == 3


def test_without_usage_it_is_split_by_a_fixed_seed(tmp_path):
    lines = [f"{i % 2},{' '.join(['7'] * 4)}" for i in range(20)]
    path = write(tmp_path / "faces.csv", lines, "emotion,pixels")
    train, test = data.load(path, "train"), data.load(path, "test")
    assert (len(train), len(test)) == (16, 4)
    assert test.class_counts()[:2].tolist() == [2, 2]
    assert train.input_shape == (1, 2, 2)
    with pytest.raises(FormatError, match="no column 'usage'"):
        data.read_fer2013(path, "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7,1 2 3 4,Training", "line 3: emotion '7'"),
        ("-1,1 2 3 4,Training", "line 3: emotion '-1'"),
        ("happy,1 2 3 4,Training", "line 3: emotion 'happy'"),
        ("000000000123,1 2 3 4,Training", "line 3: emotion"),
        ("0,1 2 3 256,Training", "line 3: pixels are not all numbers"),
        ("0,1 2 3 x,Training", "line 3: pixels are not all numbers"),
        ("0,1 2 3 4x,Training", "line 3: pixels are not all numbers"),
        ("0,1 2 3 -4,Training", "line 3: pixels are not all numbers"),
        ("0,1 2 3 4.5,Training", "line 3: pixels are not all numbers"),
        ("0,1 2 3 99999999999999999999,Training", "line 3: pixels are not all numbers"),
        ("0,1 2 3,Training", "line 3: 3 pixels are no square"),
        ("0,,Training", "line 3: 0 pixels are no square"),
        ("0,1 2 3 4 5 6 7 8 9,Training", "line 3: 9 pixels, the first row has 4"),
        ("0,1 2 3 4", "line 3: 2 cells, the header has 3"),
        ("0,1 2 3 4,Training,x", "line 3: 4 cells"),
    ],
)
def test_malformed_row(tmp_path, line, message):
    path = write(tmp_path / "fer.csv", ["0,1 2 3 4,Training", line])
    with pytest.raises(FormatError, match=message) as error:
        data.read_fer2013(path, "train")
    assert str(path) in str(error.value)


def test_malformed_file(tmp_path):
    path = tmp_path / "fer.csv"
    for content, message in (
        (b"", "no column 'emotion'"),
        (b"a,b,c\n", "no column 'emotion'"),
        (b"emotion,pixels,Usage\n\xff\xfe\x00", "no text in UTF-8"),
        (b"emotion,pixels,Usage\n0," + b"1 " * 100_000 + b",Training\n", "line 2: field larger"),
        (b"emotion,pixels,Usage\n0," + b"1 " * 600_000 + b",Training\n", "a line of more than"),
    ):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=message):
            data.read_fer2013(path, "train")
    write(path, [])
    with pytest.raises(MissingDataError, match="no row of the train part"):
        data.read_fer2013(path, "train")
    with pytest.raises(ValueError, match="split: 'dev' is none of"):
        data.read_fer2013(path, "dev")
    with pytest.raises(MissingDataError, match="does not exist"):
        data.read_fer2013(tmp_path / "none.csv")
