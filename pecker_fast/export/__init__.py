"""What comes out: diffusers folders, single files, deltas, LoRA files."""

from pecker_fast.export.delta import apply_to_folder
from pecker_fast.export.folder import Result, sound, write_unet
from pecker_fast.export.formats import FORMATS, LoraForm, export_file, export_folder

__all__ = ["FORMATS", "LoraForm", "Result", "apply_to_folder", "export_file", "export_folder", "sound", "write_unet"]
