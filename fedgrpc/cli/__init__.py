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
    "privacy": "fedgrpc.cli.privacy:COMMAND",
    "pause": "fedgrpc.cli.operator:PAUSE",
    "resume": "fedgrpc.cli.operator:RESUME",
    "rollback": "fedgrpc.cli.operator:ROLLBACK",
    "stop": "fedgrpc.cli.operator:STOP",
    **{
        f"run {name}": f"fedgrpc.cli.run:{name.upper()}"
        for name in ("submit", "list", "show", "pause", "resume", "stop", "rollback", "set", "clone", "remove")
    },
    "token create": "fedgrpc.cli.authority:TOKEN_CREATE",
    "token list": "fedgrpc.cli.authority:TOKEN_LIST",
    "token delete": "fedgrpc.cli.authority:TOKEN_DELETE",
    "device list": "fedgrpc.cli.identity:DEVICE_LIST",
    "device show": "fedgrpc.cli.identity:DEVICE_SHOW",
    "device approve": "fedgrpc.cli.identity:DEVICE_APPROVE",
    "device revoke": "fedgrpc.cli.identity:DEVICE_REVOKE",
    "device rename": "fedgrpc.cli.identity:DEVICE_RENAME",
    "device forget": "fedgrpc.cli.identity:DEVICE_FORGET",
    "operator create": "fedgrpc.cli.identity:OPERATOR_CREATE",
    "operator list": "fedgrpc.cli.identity:OPERATOR_LIST",
    "operator revoke": "fedgrpc.cli.identity:OPERATOR_REVOKE",
    "operator forget": "fedgrpc.cli.identity:OPERATOR_FORGET",
    "ca rotate": "fedgrpc.cli.authority:CA_ROTATE",
    "ca list": "fedgrpc.cli.authority:CA_LIST",
    "ca retire": "fedgrpc.cli.authority:CA_RETIRE",
    "audit": "fedgrpc.cli.operator:AUDIT",
    "backup": "fedgrpc.cli.backup:BACKUP",
    "restore": "fedgrpc.cli.backup:RESTORE",
    "model list": "fedgrpc.cli.models:MODEL_LIST",
    "model get": "fedgrpc.cli.models:MODEL_GET",
    "model tag": "fedgrpc.cli.models:MODEL_TAG",
    "model diff": "fedgrpc.cli.models:MODEL_DIFF",
    "model export": "fedgrpc.cli.model_export:MODEL_EXPORT",
    "model follow": "fedgrpc.cli.model_follow:MODEL_FOLLOW",
    "release start": "fedgrpc.cli.releases:RELEASE_START",
    "release list": "fedgrpc.cli.releases:RELEASE_LIST",
    "release show": "fedgrpc.cli.releases:RELEASE_SHOW",
    "release abort": "fedgrpc.cli.releases:RELEASE_ABORT",
    "init": "fedgrpc.cli.learning_task:INIT",
    "check": "fedgrpc.cli.check:CHECK",
    "plan": "fedgrpc.cli.plan:COMMAND",
    "health": "fedgrpc.cli.health:COMMAND",
    "plugins": "fedgrpc.cli.plugins:COMMAND",
    "simulate": "fedgrpc.cli.simulate:COMMAND",
    "sweep": "fedgrpc.cli.sweep:COMMAND",
    "profile": "fedgrpc.cli.profile:COMMAND",
    "trace generate": "fedgrpc.cli.trace:GENERATE",
    "trace import": "fedgrpc.cli.trace:IMPORT",
}
# Commands of two words, by their first.
GROUPS: Final = {
    "run": "Runs: submit, list, show, pause, resume, stop, rollback, set, clone, remove.",
    "token": "Join tokens, with which devices become members: create, list, delete.",
    "device": "Devices: list, show, approve, revoke, rename, forget.",
    "trace": "Availability traces for simulations: generate, import.",
    "ca": "The built-in certificate authority: rotate, list, retire.",
    "operator": "People who watch or steer: create, list, revoke, forget.",
    "model": "Versions of a model: list, get, tag, diff, export, follow.",
    "release": "Releases of a version to devices: start, list, show, abort.",
}
# The command of a group that is meant where none is named: `fedgrpc release RUN@best`.
DEFAULTS: Final = {"release": "start"}
