//! The metadata server: names, places and watches; never on the IO path.
