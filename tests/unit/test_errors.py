"""Faults that cross a process's border."""

import pickle

import pytest

from kernelm_sdk.errors import ClientFault, KernelFault, PluginFault


@pytest.mark.parametrize("kind", [ClientFault, PluginFault, KernelFault])
def test_a_fault_of_a_worker_process_arrives_as_it_was(kind):
    """As concurrent.futures does it, which takes what can't be unpickled for the death of the process."""
    found = pickle.loads(pickle.dumps(kind("lost", "it is gone", "look for it", retriable=True, place="here")))
    assert type(found) is kind
    assert (found.code, found.message, found.remedy, found.retriable, found.details) == (
        "lost", "it is gone", "look for it", True, {"place": "here"})  # fmt: skip
