"""The command `fedgrpc`. Settings are read here, once; everything below gets values."""

from typing import Final

from fedgrpc.process import end_on_sigterm_as_init

# Before the imports of the command, which take a second on a small device.
end_on_sigterm_as_init()

# Where each command lives, by its name, which is that of its table in the settings file, too. Imported when it is
# run: `fedgrpc status` needs no training code.
COMMANDS: Final = {
    "aggregator": "fedgrpc.cli.aggregator:COMMAND",
    "worker": "fedgrpc.cli.worker:COMMAND",
    "demo": "fedgrpc.cli.demo.command:COMMAND",
    "status": "fedgrpc.cli.status:STATUS",
    "watch": "fedgrpc.cli.status:WATCH",
    "pause": "fedgrpc.cli.operator:PAUSE",
    "resume": "fedgrpc.cli.operator:RESUME",
    "rollback": "fedgrpc.cli.operator:ROLLBACK",
    "stop": "fedgrpc.cli.operator:STOP",
    "init": "fedgrpc.cli.init:COMMAND",
    "plan": "fedgrpc.cli.plan:COMMAND",
    "health": "fedgrpc.cli.health:COMMAND",
    "simulate": "fedgrpc.cli.simulate:COMMAND",
}
