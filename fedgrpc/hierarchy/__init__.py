"""An aggregator below another one: a worker to the one above, an aggregator to its own workers.

    above   process   the process: one link up, and below it one aggregator for the run above
      |     upstream  takes tasks from above, as any worker does, and sends what the round below made of them; a
      |               second link up, while there are evaluators below
      |     desk      where a task from above meets the round that carries it out
      |     driver    plays that round
    below   mean      the mean of its updates, on the disk until it is sent

The rule: a round below has the number of the round above whose task it carries out, and starts from the same
version. Whatever process dies, the task, the round and its updates are on the disk, and go on from there.
"""
