"""The only door to the disk: safe reading, checks of model folders, atomic writing."""

from pecker_fast.files.folders import (
    CONFIG_NAME,
    UNETS,
    WEIGHTS_NAME,
    check_model_folder,
    check_parts,
    read_weights,
    weight_files,
)
from pecker_fast.files.hashes import sha256_file, sha256_tensors
from pecker_fast.files.names import is_hub_name, resolve_model, revision_of, shipped_models
from pecker_fast.files.reading import (
    MAX_HEADER_BYTES,
    MAX_TEXT_BYTES,
    PICKLE_SUFFIXES,
    check_tensors,
    read_head,
    read_json,
    read_tensors,
    read_text,
)
from pecker_fast.files.writing import (
    fsync_folder,
    output_errors,
    remove,
    replace,
    replace_folder,
    whole_folder,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)

__all__ = [
    "CONFIG_NAME",
    "MAX_HEADER_BYTES",
    "MAX_TEXT_BYTES",
    "PICKLE_SUFFIXES",
    "UNETS",
    "WEIGHTS_NAME",
    "check_model_folder",
    "check_parts",
    "check_tensors",
    "fsync_folder",
    "is_hub_name",
    "output_errors",
    "read_head",
    "read_json",
    "read_tensors",
    "read_text",
    "read_weights",
    "remove",
    "replace",
    "replace_folder",
    "resolve_model",
    "revision_of",
    "sha256_file",
    "sha256_tensors",
    "shipped_models",
    "weight_files",
    "whole_folder",
    "write_bytes",
    "write_json",
    "write_tensors",
    "write_text",
]
