"""The commands of ``fluxkontext``, one file each; imported by the command line alone.

A command's module has ``add(commands, common)``, which adds its parser and says what runs it. What
runs returns None, or an exit code of its own; it imports what it needs when it runs.
"""

from . import bench, build, calibrate, doctor, edit, export, generate, inspect, plan, quantize

COMMANDS = (edit, generate, build, calibrate, quantize, export, plan, inspect, bench, doctor)
"""In the order in which --help lists them."""
