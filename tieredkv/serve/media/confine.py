"""Takes from this process what decoding does not need, before it reads a film: whoever takes it over finds little."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from contextlib import suppress

import av
import numpy
import PIL

import tieredkv
from tieredkv.serve.media.limits import Limits

_NO_NEW_PRIVILEGES, _DUMPABLE = 38, 4
"""Options of prctl."""
_NEW_USERS, _NEW_NETWORK = 0x10000000, 0x40000000
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""Landlock's system calls, the same on all machines."""
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_CODE = (os, tieredkv, numpy, PIL, av)
"""Some of their modules are imported when they are first used."""
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights on files each version of Landlock knows; later ones know 16."""


def confine(limits: Limits, film: int) -> None:
    """Limit memory, processor time and files for good. film: descriptor of the only file that may still be read.

    Limits that the system does not have are left out. On Linux 5.13 and later nothing else can be read but the code of
    Python and of the libraries that decode, and nothing written. There is no network where the system lets a process
    give it up, and from Linux 6.7 on no TCP in any case.
    """
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_NOFILE, 64)
    _lower(resource.RLIMIT_AS, limits.memory)
    _lower(resource.RLIMIT_CPU, limits.processor_s)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_DUMPABLE, 0, 0, 0, 0)
        if libc.unshare(_NEW_NETWORK) != 0:  # for root alone; others need a name space of users around it
            libc.unshare(_NEW_USERS | _NEW_NETWORK)
        if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0:
            _landlock(libc, film)


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(OSError, ValueError):  # some systems know a limit that they do not let anybody set
        resource.setrlimit(kind, (value, value))


def _landlock(libc: ctypes.CDLL, film: int) -> None:
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    rights = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    attributes = struct.pack("QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return
    try:
        libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", _READ_FILE, film), 0)
        for folder in {os.path.dirname(str(module.__file__)) for module in _CODE}:
            with suppress(OSError):  # then nothing more can be imported from there in any case
                descriptor = os.open(folder, os.O_PATH)
                libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", _READ_FILE | _READ_FOLDER, descriptor), 0)
                os.close(descriptor)
        libc.syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
