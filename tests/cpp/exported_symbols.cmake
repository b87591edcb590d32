# The library exports what its header declares and nothing else. Needs NM, LIBRARY and HEADER.
execute_process(COMMAND ${NM} -D --defined-only -P ${LIBRARY} OUTPUT_VARIABLE listing RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${NM}: ${result}")
endif()
string(REGEX MATCHALL "(^|\n)[^ \n]+" exported "${listing}")
list(TRANSFORM exported STRIP)
list(SORT exported)

file(READ ${HEADER} header)
string(REGEX REPLACE "/\\*[^*]*\\*+([^/*][^*]*\\*+)*/" "" header "${header}")
string(REGEX MATCHALL "\nLLM2_FAST_API[^;(]*\\(" declarations "${header}")
list(TRANSFORM declarations REPLACE ".*[ *\n](llm2_fast_[a-z0-9_]+)\\($" "\\1")
list(SORT declarations)

if(NOT exported STREQUAL declarations)
  message(FATAL_ERROR "exported: ${exported}\ndeclared: ${declarations}")
endif()
