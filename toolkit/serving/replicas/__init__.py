"""Several servers of one spec behind one address, on one machine or many."""
