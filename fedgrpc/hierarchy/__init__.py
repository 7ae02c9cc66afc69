"""A leaf: an aggregator that is a worker of another aggregator, its parent.

    process             the process: two links to the parent, and an aggregator for the parent's run
    upstream            the links: takes tasks as any worker does, and sends what the leaf's round made of them
    handoff             hands a parent's task over to the round that carries it out
    parent_rounds       plays that round
    partial_aggregate   the mean of its updates, on the disk until it is sent
    leaf_run            the leaf's aggregator, one for each run of the parent

The rule: a leaf's round has the number of the parent's round whose task it carries out, and starts from the same
version. Whichever process dies, the task, the round and its updates are on the disk and continue from there.
"""
