#pragma once

#include <cstdlib>
#include <iostream>
#include <string_view>

/// Ends the test with what failed and where; unlike assert, also when built with NDEBUG.
#define CHECK(condition)                                                                    \
    do {                                                                                    \
        if (!(condition)) {                                                                 \
            std::cerr << __FILE__ << ':' << __LINE__ << ": failed: " << #condition << '\n'; \
            std::exit(EXIT_FAILURE);                                                        \
        }                                                                                   \
    } while (false)

/// Whether `action` throws an Error that says `text`.
template <typename Error, typename Action>
bool throws(std::string_view text, Action action) {
    try {
        action();
    } catch (const Error& error) {
        if (std::string_view(error.what()).find(text) != std::string_view::npos) return true;
        std::cerr << "instead of \"" << text << "\": " << error.what() << '\n';
    }
    return false;
}
