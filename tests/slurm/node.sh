# One node of a test's cluster: slurmd in network, host-name and PID namespaces of its own. To kill the process that
# ROOT/nodeN.pid names is to pull the node's plug: everything that runs on it is gone at once.
i=$1
echo $$ >"$ROOT/node$i.pid"
# sh stays as the first process: it reaps what slurmd's job steps leave behind.
exec ip netns exec "node$i" unshare --uts --pid --fork --mount-proc --kill-child \
  sh -c "hostname machine$i; slurmd -D -f '$ROOT/slurm.conf' -N node$i & wait"
