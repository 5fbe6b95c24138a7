/** What a running job's numbers mean. */

/** How far it is, from 0 to 1: its node if that tells, else by nodes. */
export function jobShare(job) {
  const share = job.max ? job.value / job.max : job.nodes ? job.nodes_done / job.nodes : 0;
  return Math.min(Math.max(share, 0), 1);
}
