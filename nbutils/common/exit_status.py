"""The exit status by which a rank, a launch and a run of the series say that there is more to do."""

RESUME_ME = (
    75  # EX_TEMPFAIL of sysexits.h, "try again later": asked to end, it has saved, and wants to be resumed
)
