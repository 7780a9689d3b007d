"""How processes that share no disk go on from a step (see rundir/apart/)."""
