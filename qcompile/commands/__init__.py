"""The sub-commands of `qcompile`, a module each: arguments, calls of the library, what is printed."""
