"""Folders in the native format."""

from dit_video.models.autoencoders import IdentityConfig
from dit_video.weights.folders import read_document
from dit_video.weights.io import read_native, read_native_config, write_native
from dit_video.weights.streaming import ParamsSource


def test_a_model_without_parameters_comes_back(tmp_path):
    write_native(tmp_path, IdentityConfig(), ParamsSource({}))
    config = read_native_config(tmp_path, read_document(tmp_path))
    assert config == IdentityConfig()
    assert read_native(tmp_path, config) == {}
