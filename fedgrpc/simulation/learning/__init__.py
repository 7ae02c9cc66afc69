"""The production run with real training, under a virtual clock: `fedgrpc simulate` with `[learning]`.

    experiment     an experiment as a file describes it: devices, learning task, the settings of its aggregator
    clock          an event loop whose time is virtual
    aggregator     the production aggregator of one run on that loop, without a network
    device         one device: its polls, transfers and tasks, in virtual seconds
    engine         where training really happens: here, in processes (`pool`), on other machines (`ray_engine`)
    client_work    one task's training and encoding, by the code of the worker
    client_files   what devices keep on the disk: residuals, personal layers, models
    run            all of it together

The rule: transport and clock are virtual, and nothing else is. Decisions, payloads, updates and versions are those
of the code that is deployed.
"""
