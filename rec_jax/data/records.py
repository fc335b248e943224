"""One record = one user's whole history: written as ArrayRecord through a TFDS builder, read back by random access.

The files are those of any TFDS data set (`tfds.builder_from_directory(...).as_data_source("users")` reads them). Two inner loops are
ours, because TFDS takes about 200 microseconds a record to write and as much to read: examples are encoded straight into the
protobuf, and records are read as ranges of one, which ArrayRecord serves without starting a parallel read.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from rec_jax.config_places import EVENT
from rec_jax.types import RecJaxError

SPLIT = "users"  # the one split of the TFDS data set ("all" is a reserved name there)
EVENTS_PER_SHARD = 1 << 22  # a file of about 60 MB
COLUMNS = {"items": np.int32, "times": np.int64, "ratings": np.float32, "splits": np.uint8}
READER = "max_parallelism:0,readahead_buffer_size:0"  # records are small, and callers bring their own threads
Record = dict[str, np.ndarray]


class Histories(tfds.core.dataset_builder.FileReaderBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Events sorted by user -> ArrayRecord files, record i = the history of user i, oldest event first.

    Each file is streamed. A `GeneratorBasedBuilder` would hold up to 1 GB of records in its shuffler, even with shuffling disabled,
    and spill the rest through TensorFlow, which is not installed here.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = epath.Path(__file__)  # else TFDS 4.9.10 looks for it with importlib_resources, which it does not install

    def __init__(self, columns: Mapping[str, np.ndarray], offsets: np.ndarray, data_dir: str):
        """columns {name of COLUMNS, or of a feature: [E]}, offsets [U + 1]: events of user i are [offsets[i], offsets[i + 1])."""
        self._columns, self._offsets = columns, offsets
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        # Arrays are kept as bytes: a list of protobuf integers costs about 60 ns a value, each way.
        features: dict[str, Any] = {"user": np.int32}
        for name, dtype in _dtypes(self._columns).items():
            features[name] = tfds.features.Tensor(shape=(None,), dtype=dtype, encoding=tfds.features.Encoding.BYTES)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Histories of users, oldest event first; splits: 0 train, 1 validation, 2 test.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Writes the files of the split and tells the info about them, as TFDS asks of a builder."""
        template = self._get_filename_template(split_name=SPLIT)
        shards = _shards(self._offsets)
        paths = [os.fspath(template.sharded_filepath(shard_index=i, num_shards=len(shards))) for i in range(len(shards))]
        for path, users in zip(paths, shards, strict=True):
            writer = ArrayRecordWriter(path, "group_size:1")  # groups of one: random access unpacks no neighbours
            for user in users:
                events = slice(self._offsets[user], self._offsets[user + 1])
                writer.write(_encode(user, {name: column[events] for name, column in self._columns.items()}))
            writer.close()
        info = tfds.core.SplitInfo(
            name=SPLIT,
            shard_lengths=[len(users) for users in shards],
            num_bytes=sum(os.path.getsize(path) for path in paths),
            filename_template=template,
        )
        self.info.set_splits(tfds.core.splits.SplitDict([info]))


def _shards(offsets: np.ndarray) -> list[range]:
    """offsets [U + 1] -> the users of each file: consecutive, about EVENTS_PER_SHARD events a file."""
    n_users = len(offsets) - 1
    n = max(1, round(int(offsets[-1]) / EVENTS_PER_SHARD))
    cuts = np.unique([0, *np.searchsorted(offsets, np.arange(1, n) * (int(offsets[-1]) / n)), n_users])
    return [range(int(a), int(b)) for a, b in itertools.pairwise(cuts)]


def _dtypes(names: Iterable[str]) -> dict[str, Any]:
    """The columns of records that have these: all of COLUMNS, and features of events."""
    return COLUMNS | {name: np.int32 for name in names if name.startswith(EVENT)}


def write(columns: Mapping[str, np.ndarray], offsets: np.ndarray, folder: Path) -> None:
    """columns {items, times, ratings, splits: [E]} sorted by user, offsets [U + 1] -> a TFDS data set under the local `folder`.

    Columns `event_NAME` [E] int32, features of events, are written too.

    Raises:
      RecJaxError: a column of another dtype or length than the format has.
    """
    for name, dtype in _dtypes(columns).items():
        if columns[name].dtype != dtype or columns[name].shape != (int(offsets[-1]),):
            found = f"{columns[name].dtype} {columns[name].shape}"
            raise RecJaxError(f"column {name!r} of the histories is {found}; expected {np.dtype(dtype)} ({int(offsets[-1])},)")
    builder = Histories(columns, offsets, os.fspath(folder))
    config = tfds.download.DownloadConfig(extract_dir=os.fspath(folder))  # nothing is downloaded: else it makes empty folders
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a banner
        builder.download_and_prepare(download_dir=os.fspath(folder), download_config=config)


class Records(Sequence):
    """Random access to the records under `folder`: `records[user] -> {"user" [], "items" [n], "times" [n], "ratings" [n], "splits" [n]}`,
    with features of events as "event_NAME" [n].

    The arrays are read-only. Safe to share between threads; cheap to pickle (only the folder travels), so worker processes may be
    spawned with it.

    Raises:
      RecJaxError: no TFDS data set under the folder.
    """

    def __init__(self, folder: Path):
        place = folder / Histories.name / str(Histories.VERSION)
        if not (place / "dataset_info.json").is_file():
            raise RecJaxError(f"{place} holds no prepared histories; delete {folder} and run `python -m rec_jax.data prepare` again")
        files = tfds.builder_from_directory(os.fspath(place)).info.splits[SPLIT].file_instructions
        self._folder = folder
        self._readers = [ArrayRecordReader(file.filename, READER, file_reader_buffer_size=32768) for file in files]
        self._starts = np.cumsum([0, *(file.examples_in_shard for file in files)])

    def __getstate__(self) -> Path:
        return self._folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, user: Any) -> Any:
        if isinstance(user, slice):
            return self.__getitems__(range(len(self))[user])
        index = int(user)
        if not -len(self) <= index < len(self):
            raise IndexError(f"user {index} of {len(self)}")
        index %= len(self)
        file = int(np.searchsorted(self._starts, index, "right")) - 1
        place = index - int(self._starts[file])
        return _decode(self._readers[file].read(place, place + 1)[0])

    def __getitems__(self, users: Sequence[int]) -> list[Record]:
        """Many records at once, for callers that ask for batches (as fast as one by one)."""
        return [self[user] for user in users]


def _encode(user: int, arrays: Record) -> bytes:
    """A tf.train.Example, as `tfds.features` with Encoding.BYTES writes it."""
    feature = {name: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=(a.tobytes(),))) for name, a in arrays.items()}
    feature["user"] = tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=(user,)))
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature)).SerializeToString()


def _decode(record: bytes) -> Record:
    feature = tf_example_pb2.Example.FromString(record).features.feature
    out: Record = {name: np.frombuffer(feature[name].bytes_list.value[0], dtype) for name, dtype in _dtypes(feature).items()}
    out["user"] = np.asarray(feature["user"].int64_list.value[0], np.int32)
    return out
