"""From a config file to ranks and to the first error; rehearsal and dry run. Light: never imports `training`."""
