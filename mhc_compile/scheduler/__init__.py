"""Side streams: a dependency graph with costs, a calibrated model of contention, and fork and join in the graph.

This room knows calls, bytes and seconds, and nothing of hyper-connections. The way of a graph:

    dag         the partitioned graph as tasks with costs: critical path, slack
    contention  what a device does with two kernels at once: measured pairs
    assign      which calls gain from the side stream, and where they start and have to be done
    emit        fork and join, safe against inductor, the allocator and CUDA graphs
    schedule    the pass that does these four, and what it reports
    timeline    the plan as text and as a trace for Chrome or Perfetto
    simulate    pipelines of stages (1F1B, DualPipe): what a stage's side work costs there
"""
