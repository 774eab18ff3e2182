//! The volume as seen from outside: routing, splitting, retries; and the MDS's client.
